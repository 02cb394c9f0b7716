"""Neighbours of texts, the likeliest first: another token at one place, one put in or one left out.

Chapter `12_federated`.

A text's own rows say where it went wrong: behind the place its prefixes are not those of the batch. So it is edited
where a row has far less evidence than those before it, or just there, and a neighbour is as likely as the next tokens'
rows fit better in the first blocks than they do in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import nlargest
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.missing import Missing
from dager_tutorial.server.decoder.passage import Cache, Prefix, Rows
from dager_tutorial.server.decoder.ranking import Ranking
from dager_tutorial.server.token_filter import Candidates


class Draft(NamedTuple):
    """A text that may be wrong.

    Attributes:
        text: Token ids.
        changed: Where it was changed last, and may still be wrong; None where it was not.
    """

    text: Prefix
    changed: int | None = None


class Nearby(NamedTuple):
    """What lies near a text.

    Attributes:
        gains: Texts that differ from it at one place behind its first, the likeliest ones, and how much more evidence
            their rows have, in units of a usual row of the text.
        steady: Whether none of its rows has far less evidence than those before, so that it may hardly be wrong.
    """

    gains: dict[Prefix, float]
    steady: bool


def nearby(
    ranking: Ranking,
    candidates: Candidates,
    drafts: Sequence[Draft],
    budget: Budget,
    *,
    thorough: bool,
    unheld: frozenset[int] = frozenset(),
) -> list[Nearby]:
    """The likeliest neighbours of texts.

    Args:
        ranking: Weighs extensions by the first blocks.
        candidates: Tokens that may stand at each position.
        drafts: The texts.
        budget: What it may cost.
        thorough: Whether a text may be wrong at places, too, where its rows do not fall, and leave several tokens out;
            then there are more of them.
        unheld: Tokens that must stand somewhere and that no text holds.
    """
    walk = _Walk(ranking, candidates, drafts, budget, thorough=thorough, unheld=unheld)
    inside: list[dict[Prefix, float]] = [{} for _ in drafts]
    longer: list[dict[Prefix, float]] = [{} for _ in drafts]
    for edit, gain in walk.gains():
        own = drafts[edit.text].text
        other = edit.of(own)
        mine = (longer if other[: len(own)] == own else inside)[edit.text]
        if other != own and len(other) <= ranking.passage.adapter.max_positions:
            mine[other] = max(gain, mine.get(other, gain))
    most = constants().mended_everywhere if thorough else constants().mended_tried
    return [walk.nearby(index, most, *both) for index, both in enumerate(zip(inside, longer, strict=True))]


class _Edit(NamedTuple):
    """A text with other tokens at a place.

    Attributes:
        text: Index of the text.
        place: Where it differs.
        tokens: The tokens that stand there then; none where one is left out.
        skips: How many of the text's own tokens they replace: none where they are put in.
    """

    text: int
    place: int
    tokens: Prefix
    skips: int

    def of(self, text: Prefix) -> Prefix:
        """The text, edited."""
        return (*text[: self.place], *self.tokens, *text[self.place + self.skips :])


class _Walk:
    """Texts on their way through the first blocks, all at once."""

    def __init__(
        self,
        ranking: Ranking,
        candidates: Candidates,
        drafts: Sequence[Draft],
        budget: Budget,
        *,
        thorough: bool,
        unheld: frozenset[int],
    ) -> None:
        self.ranking, self.candidates, self.drafts, self.budget = ranking, candidates, drafts, budget
        self.texts = texts = [draft.text for draft in drafts]
        self.longest = max(map(len, texts))
        self.cache, misfits = self._through(ranking.passage.empty(), texts, 0, self.longest)
        # Positions are alike behind the first, and what false rows do at one of them tells for all.
        middle = (self.longest + 1) // 2
        self.chance = ranking.chance(self._before(range(len(texts)), middle), middle)
        evidence = [self.chance.evidence(each).tolist() for each in misfits]
        self.own = [[each[index] for each in evidence[: len(text)]] for index, text in enumerate(texts)]
        self.weakest = [self._weakest(index) if thorough else [] for index in range(len(texts))]
        self.missing = Missing(ranking, candidates, self.chance, ranking.batch_tokens.new_tensor(sorted(unheld)))

    def gains(self) -> Iterator[tuple[_Edit, float]]:
        """How much more evidence the rows behind have in each neighbour than in the text itself, while time is left."""
        for place in range(max(1, len(self.candidates.prompt)), self.longest + 1):
            if self.budget.late:
                return
            here = [index for index in range(len(self.texts)) if self._doubtful(index, place)]
            edits = [*self._proposed(here, place), *self._left_out(here, place)] if here else []
            yield from zip(edits, self._gained(edits, place), strict=True)

    def nearby(self, index: int, most: int, inside: dict[Prefix, float], longer: dict[Prefix, float]) -> Nearby:
        """The likeliest neighbours of a text, some of them longer ones: a row more is no less evidence, true or not."""
        fewer = round(constants().mended_longer * most)
        best = {
            text: gains[text]
            for gains, count in ((inside, most - fewer), (longer, fewer))
            for text in nlargest(count, gains, key=gains.__getitem__)
        }
        usual = max(self.usual(index), 1.0)
        return Nearby({text: gain / usual for text, gain in best.items()}, self.steady(index))

    def _doubtful(self, index: int, place: int) -> bool:
        """Whether a text may be wrong at a place: its row falls there or next, or it was changed there, or ends."""
        length = len(self.texts[index])
        if place in self.weakest[index][: constants().mended_weakest]:
            return True
        if place == length or self.drafts[index].changed in (place, place - 1):
            return True
        return any(self._falls(index, at) for at in range(place, min(place + 2, length)))

    def usual(self, index: int) -> float:
        """The evidence of a usual row of a text."""
        return median(self.own[index])

    def steady(self, index: int) -> bool:
        """Whether no row of a text has far less evidence than those before."""
        return not any(self._falls(index, place) for place in range(1, len(self.texts[index])))

    def _falls(self, index: int, place: int) -> bool:
        """Whether a text's row at a place has far less evidence than those just before."""
        return self._beside(index, place) < constants().mended_places

    def _beside(self, index: int, place: int) -> float:
        """The evidence of a text's row at a place, in units of the usual one just before."""
        own = self.own[index]
        before = own[max(1, place - constants().mended_before) : place] or own[:1]
        return own[place] / max(median(before), 1e-3)

    def _proposed(self, here: list[int], place: int) -> Iterator[_Edit]:
        """Edits at a place of some texts, with the tokens that fit best there."""
        begun = torch.tensor([self.texts[index][0] for index in here], device=self.ranking.batch_tokens.device)
        cache, tokens = self._before(here, place), self.candidates.at(place)
        rows = self.ranking.promising(cache, begun, place, tokens, self.chance) if len(tokens) else None
        for at, index in enumerate(here):
            inside = place < len(self.texts[index])
            if inside:
                yield _Edit(index, place, (), 1)
            for token in [] if rows is None else self._best(rows, at):
                yield _Edit(index, place, (token,), 0)
                if inside:
                    yield _Edit(index, place, (token,), 1)

    def _left_out(self, here: list[int], place: int) -> Iterator[_Edit]:
        """Edits that put several tokens in at a place of some texts, where its rows are weakest."""
        for index in here:
            if place in self.weakest[index][: constants().missing_places]:
                for tokens in self.missing.strings(self._before([index], place), self.texts[index][0], place):
                    yield _Edit(index, place, tokens, 0)
                    yield _Edit(index, place, tokens, 1)

    def _weakest(self, index: int) -> list[int]:
        """The places of a text behind its first, those with the least evidence beside the rows just before first."""
        return sorted(range(1, len(self.texts[index])), key=lambda place: self._beside(index, place))

    def _best(self, rows: Rows, at: int) -> list[int]:
        """The tokens behind one prefix that fit best."""
        mine = rows.take((rows.places == at).nonzero()[:, 0])
        order = self.chance.evidence(self.ranking.misfits(mine)).argsort(descending=True)
        return [int(token) for token in mine.tokens[order[: constants().mended_tokens]]]

    def _gained(self, edits: list[_Edit], place: int) -> list[float]:
        """How much more evidence the tokens behind an edit have in the neighbours than in the texts, summed.

        Token by token: one put in may well have little evidence itself, and others have it where it stands. So it
        counts only where it takes another's place, or comes last.
        """
        if not edits:
            return []
        others = [edit.of(self.texts[edit.text]) for edit in edits]
        added = max(1, *(len(edit.tokens) for edit in edits))
        end = min(place + added + constants().mended_behind, max(map(len, others)))
        _, misfits = self._through(self._before([edit.text for edit in edits], place), others, place, end)
        found = [self.chance.evidence(each).tolist() for each in misfits]
        return [
            self._gain(edit, [each[index] for each in found[: len(other) - place]])
            for index, (edit, other) in enumerate(zip(edits, others, strict=True))
        ]

    def _gain(self, edit: _Edit, rows: list[float]) -> float:
        """What is gained where a neighbour has so much evidence from the place on."""
        own, added = self.own[edit.text], len(edit.tokens)
        old = own[edit.place + edit.skips :][: constants().mended_behind + (not added)]
        gain = sum(after - before for after, before in zip(rows[added:], old, strict=False))
        if added and edit.skips:
            return gain + rows[0] - own[edit.place]
        return gain + rows[0] if edit.place == len(own) else gain

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
