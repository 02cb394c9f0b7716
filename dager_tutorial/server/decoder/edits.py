"""Neighbours of texts, the likeliest first: another token at one place, one put in or one left out.

Chapter `12_federated`.

A text's own rows say where it went wrong: behind the place its prefixes are not those of the batch. So it is edited
where a row has far less evidence than those before it, or just there, and a neighbour is as likely as its rows fit
better in the first blocks than the text's own, from the place on where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import nlargest
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.passage import Cache, Prefix, Rows
from dager_tutorial.server.decoder.ranking import Ranking
from dager_tutorial.server.token_filter import Candidates


class Nearby(NamedTuple):
    """What lies near a text.

    Attributes:
        texts: Those that differ from it in one token behind its first, the likeliest ones.
        steady: Whether none of its rows has far less evidence than those before, so that it may hardly be wrong.
    """

    texts: list[Prefix]
    steady: bool


def nearby(ranking: Ranking, candidates: Candidates, texts: Sequence[Prefix], budget: Budget) -> list[Nearby]:
    """The likeliest neighbours of texts.

    Args:
        ranking: Weighs extensions by the first blocks.
        candidates: Tokens that may stand at each position.
        texts: Token ids.
        budget: What it may cost.
    """
    walk = _Walk(ranking, candidates, texts, budget)
    gains: list[dict[Prefix, float]] = [{} for _ in texts]
    for edit, gain in walk.gains():
        own, mine = texts[edit.text], gains[edit.text]
        other = edit.of(own)
        if other != own and len(other) <= ranking.passage.adapter.max_positions:
            mine[other] = max(gain, mine.get(other, gain))
    best = (nlargest(constants().mended_tried, mine, key=mine.__getitem__) for mine in gains)
    return [Nearby(others, walk.steady(index)) for index, others in enumerate(best)]


class _Edit(NamedTuple):
    """A text with another token at a place.

    Attributes:
        text: Index of the text.
        place: Where it differs.
        token: The token that stands there then; None where one is left out.
        skips: How many of the text's own tokens it replaces: none where one is put in.
    """

    text: int
    place: int
    token: int | None
    skips: int

    def of(self, text: Prefix) -> Prefix:
        """The text, edited."""
        added = () if self.token is None else (self.token,)
        return (*text[: self.place], *added, *text[self.place + self.skips :])


class _Walk:
    """Texts on their way through the first blocks, all at once."""

    def __init__(self, ranking: Ranking, candidates: Candidates, texts: Sequence[Prefix], budget: Budget) -> None:
        self.ranking, self.candidates, self.texts, self.budget = ranking, candidates, texts, budget
        self.longest = max(map(len, texts))
        self.cache, misfits = self._through(ranking.passage.empty(), texts, 0, self.longest)
        # Positions are alike behind the first, and what false rows do at one of them tells for all.
        middle = (self.longest + 1) // 2
        self.chance = ranking.chance(self._before(range(len(texts)), middle), middle)
        self.own = [self.chance.evidence(each).tolist() for each in misfits]

    def gains(self) -> Iterator[tuple[_Edit, float]]:
        """How much more evidence each neighbour's rows have than the text's own, on average, while time is left."""
        for place in range(max(1, len(self.candidates.prompt)), self.longest + 1):
            if self.budget.late:
                return
            here = [index for index in range(len(self.texts)) if self._doubtful(index, place)]
            edits = list(self._proposed(here, place)) if here else []
            yield from zip(edits, self._gained(edits, place), strict=True)

    def _doubtful(self, index: int, place: int) -> bool:
        """Whether a text may be wrong at a place: its row there, or the next one, falls, or another may stand there."""
        length = len(self.texts[index])
        return place == length or any(self._falls(index, at) for at in range(place, min(place + 2, length)))

    def steady(self, index: int) -> bool:
        """Whether no row of a text has far less evidence than those before."""
        return not any(self._falls(index, place) for place in range(1, len(self.texts[index])))

    def _falls(self, index: int, place: int) -> bool:
        """Whether a text's row at a place has far less evidence than those just before."""
        before = self.own[max(1, place - constants().mended_before) : place] or self.own[:1]
        return self.own[place][index] < constants().mended_places * median(each[index] for each in before)

    def _proposed(self, here: list[int], place: int) -> Iterator[_Edit]:
        """Edits at a place of some texts, with the tokens that fit best there."""
        begun = torch.tensor([self.texts[index][0] for index in here], device=self.ranking.batch_tokens.device)
        cache, tokens = self._before(here, place), self.candidates.at(place)
        rows = self.ranking.promising(cache, begun, place, tokens, self.chance) if len(tokens) else None
        for at, index in enumerate(here):
            inside = place < len(self.texts[index])
            if inside:
                yield _Edit(index, place, None, 1)
            for token in [] if rows is None else self._best(rows, at):
                yield _Edit(index, place, token, 0)
                if inside:
                    yield _Edit(index, place, token, 1)

    def _best(self, rows: Rows, at: int) -> list[int]:
        """The tokens behind one prefix that fit best."""
        mine = rows.take((rows.places == at).nonzero()[:, 0])
        order = self.chance.evidence(self.ranking.misfits(mine)).argsort(descending=True)
        return [int(token) for token in mine.tokens[order[: constants().mended_tokens]]]

    def _gained(self, edits: list[_Edit], place: int) -> list[float]:
        """The mean evidence of neighbours' rows from a place on, less that of the texts' own rows there."""
        if not edits:
            return []
        others, end = [edit.of(self.texts[edit.text]) for edit in edits], self._end(place)
        _, misfits = self._through(self._before([edit.text for edit in edits], place), others, place, end)
        found = [self.chance.evidence(each).tolist() for each in misfits]
        return [
            _mean([each[index] for each in found[: len(other) - place]])
            - _mean([each[edit.text] for each in self.own[place : min(end, len(self.texts[edit.text]))]])
            for index, (edit, other) in enumerate(zip(edits, others, strict=True))
        ]

    def _end(self, place: int) -> int:
        """The place up to which rows are compared."""
        return min(place + 1 + constants().mended_behind, self.longest)

    def _before(self, here: Sequence[int], place: int) -> Cache:
        """Keys and values of the prefixes of some texts up to a place."""

        def cut(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(part[list(here), :place] for part in parts)

        return Cache(cut(self.cache.keys), cut(self.cache.values))

    def _through(self, cache: Cache, texts: Sequence[Prefix], begin: int, end: int) -> tuple[Cache, list[Tensor]]:
        """Texts' tokens from one place to another behind the first blocks; short texts repeat their last token."""
        passage, misfits = self.ranking.passage, []
        for place in range(begin, end):
            places = torch.arange(len(texts)) if place else torch.zeros(len(texts), dtype=torch.long)
            tokens = torch.tensor([text[min(place, len(text) - 1)] for text in texts])
            device = self.ranking.batch_tokens.device
            rows = passage.enter(places.to(device), tokens.to(device), place)
            rows = passage.through(rows, cache, passage.halves)
            misfits.append(self.ranking.misfits(rows))
            cache = passage.grown(cache, rows)
        return cache, misfits


def _mean(evidence: list[float]) -> float:
    """The mean; 0 of none."""
    return mean(evidence) if evidence else 0.0
