"""A text grown by what its rows explain, tap after tap and token after token (chapter `11_limits`).

An extension is weighed by how much its row would explain of what its prefix leaves, at every tap of every block, in
deviations of random extensions. Wrong last tokens explain less, and copies of a text with an early token wrong fall
behind; a text that leaves nothing is the only one that can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.tap import QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.narrow.wanted import Explained, Wanted
from dager_tutorial.server.decoder.passage import Cache, Passage, Prefix, Rows
from dager_tutorial.server.decoder.summed.search import SummedSearch
from dager_tutorial.server.decoder.summed.weighing import Scale
from dager_tutorial.server.pairs import Forms


@dataclass(frozen=True)
class Front:
    """Prefixes of one length, the likeliest first.

    Attributes:
        prefixes: Their tokens.
        totals: float32, by how many deviations they explain more than chance, summed.
        cache: Their keys and values.
        explained: For each tap what they explain, one record for each set of directions.
    """

    prefixes: tuple[Prefix, ...]
    totals: Float[Tensor, " prefixes"]
    cache: Cache
    explained: Mapping[Tap, tuple[Explained, ...]]

    @property
    def left(self) -> Float[Tensor, "sets prefixes"]:
        """What each prefix leaves of each set of directions (float32)."""
        return torch.stack([each.left() for sets in self.explained.values() for each in sets])


@dataclass
class NarrowSearch:
    """Grows the prefixes that explain most of all taps' directions.

    Attributes:
        passage: The blocks, which keep the vectors of every tap but block 0's first.
        wanted: What is to be explained, tap by tap in the order of the forward pass, block 0's first tap among them:
            one or several sets of directions at each.
        budget: What it may cost.
        generator: Source of randomness, on the CPU.
    """

    passage: Passage
    wanted: Mapping[Tap, Sequence[Wanted]]
    budget: Budget
    generator: torch.Generator
    _likely: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def run(self) -> tuple[Prefix, bool]:
        """The likeliest text, and whether it explains everything."""
        adapter = self.passage.adapter
        explained = {tap: tuple(map(Explained.nothing, sets)) for tap, sets in self.wanted.items()}
        front = Front(((),), adapter.first_input.tokens.new_zeros(1), self.passage.empty(), explained)
        for position in range(min(adapter.max_positions, self._longest)):
            if self.budget.late:
                break
            front, complete = self._step(front, position)
            self.budget.report("search", position + 1)
            if bool(complete.any()):
                return front.prefixes[int(complete.nonzero()[0, 0])], True
        return front.prefixes[0], False

    @property
    def _longest(self) -> int:
        """How long a text may be: many more rows than directions hide them, and as many as the width explain all."""
        shapes = [each.directions.shape for sets in self.wanted.values() for each in sets]
        room = min(width for _, width in shapes) - constants().oversampling
        return min(room, constants().rows_a_direction * max(count for count, _ in shapes))

    def _step(self, front: Front, position: int) -> tuple[Front, Bool[Tensor, " prefixes"]]:
        """The front one token longer, and which of its prefixes leave nothing."""
        rows, count = self._screened(front, position), max(len(front.prefixes), constants().beam)
        scale, scores = self._usual(front, position), front.totals
        for halves, most in SummedSearch.stages(self.passage.halves):
            rows = self.passage.through(rows, front.cache, halves)
            scores = self._scores(front, rows, scale)
            best = scores.argsort(descending=True)[: most * count]
            rows, scores = rows.take(best), scores[best]
        totals = front.totals[rows.places] + scores
        best = totals.argsort(descending=True)[: constants().narrow_beam]
        return self._grown(front, rows.take(best), totals[best])

    def _grown(self, front: Front, rows: Rows, totals: Tensor) -> tuple[Front, Tensor]:
        vectors = self._vectors(rows)
        explained = {
            tap: tuple(each.grown(inputs, rows.places) for each in front.explained[tap])
            for tap, inputs in vectors.items()
        }
        grown = Front(tuple(rows.named(front.prefixes)), totals, self.passage.grown(front.cache, rows), explained)
        # The last row leaves rounding where the one before left a direction: at most taps, for a few may be blurred.
        complete = constants().clear_gap * grown.left <= front.left[:, rows.places]
        return grown, complete.float().mean(0) > 0.5

    def _screened(self, front: Front, position: int) -> Rows:
        """The extensions of each prefix that explain most at block 0's first tap."""
        tokens, first = self._tokens(position), next(iter(self.wanted))
        adapter, parts = self.passage.adapter, []
        vectors = adapter.attention_input(0, adapter.embed(tokens, position))
        odds = torch.stack([_odds(each.gains_of_all(vectors)) for each in front.explained[first]]).sum(0)
        for place, prefix in enumerate(front.prefixes):
            gains, most = odds[place], constants().narrow_screened
            if adapter.first_input.positions is None:  # a token that was there before adds nothing there, and may come
                before = torch.isin(tokens, tokens.new_tensor(prefix))
                gains, most = gains.masked_fill(before, math.inf), most + int(before.sum())
            choice = gains.argsort(descending=True)[:most]
            parts.append(self.passage.enter(torch.full_like(choice, place), tokens[choice], position))
        return Rows.joined(parts)

    def _tokens(self, position: int) -> Int[Tensor, " tokens"]:
        """The tokens that would explain most at a position if nothing were explained yet."""
        source = self.passage.adapter.first_input
        if source.positions is None:
            position = 0
        if position not in self._likely:
            start, places = position, source.tokens.new_zeros(1, source.tokens.shape[1])
            if source.positions is not None:
                places = source.positions[start : start + constants().filter_positions]
            self._likely.update({start + index: each for index, each in enumerate(self._likeliest(places))})
        return self._likely[position]

    def _likeliest(self, places: Float[Tensor, "places width"]) -> Sequence[Tensor]:
        """For each place the tokens with the largest share in the directions of block 0's first tap."""
        source = self.passage.adapter.first_input
        shares = source.tokens.new_zeros(len(source.tokens), len(places))
        for wanted in next(iter(self.wanted.values())):
            directions = wanted.whitening @ wanted.directions.T
            budget = Budget(memory=self.budget.memory)  # no deadline: what was begun is needed whole
            forms = Forms(source, directions, torch.ones_like(directions[0]), budget, wanted.whitening.T)
            parts = [pairs.inside.values / pairs.size.clamp(min=1e-30) for pairs in forms.at(places)]
            shares += torch.cat(parts).clamp(min=1e-30).log()
        count = min(constants().narrow_tokens, len(shares))
        return shares.topk(count, 0).indices.T.unbind()

    def _usual(self, front: Front, position: int) -> Scale:
        """What random extensions explain."""
        vocabulary = torch.arange(len(self.passage.adapter.first_input.tokens), device=front.totals.device)
        return Scale.of(self._gains(front, self.passage.random(front.cache, vocabulary, position, self.generator)))

    def _scores(self, front: Front, rows: Rows, scale: Scale) -> Float[Tensor, " rows"]:
        """By how many deviations rows explain more than random ones, over the taps so far."""
        odds = self._gains(front, rows)
        count, least = odds.shape[1], -constants().largest_deviation
        # What a token explains again, which was there before, is nothing: that speaks against it no more than so much.
        deviations = ((odds - scale.centre[:count]) / scale.spread[:count]).clamp(min=least)
        return deviations.sum(1) / math.sqrt(count)

    def _gains(self, front: Front, rows: Rows) -> Float[Tensor, "rows sets"]:
        """What rows would explain, at the taps so far, as log-odds."""
        vectors = self._vectors(rows)
        gains = [each.gains(inputs, rows.places) for tap, inputs in vectors.items() for each in front.explained[tap]]
        return _odds(torch.stack(gains, 1))

    def _vectors(self, rows: Rows) -> dict[Tap, Tensor]:
        """What entered the taps so far."""
        adapter = self.passage.adapter
        first = adapter.attention_input(0, adapter.embed(rows.tokens, rows.position))
        return dict(zip(self.wanted, (first, *rows.evidence), strict=False))


def _odds(gains: Float[Tensor, "rows others"]) -> Float[Tensor, "rows others"]:
    """Logarithms of what is explained of a row over what is not: a true row may be explained nearly whole."""
    return gains.clamp(constants().nothing_new, 1 - constants().nothing_new).logit()


def readable(wanted: Mapping[Tap, Sequence[Wanted]]) -> bool:
    """Whether candidates can be screened at block 0's query, key and value."""
    first = next(iter(wanted), None)
    return first is not None and (first.block, first.kind) == (0, QKV)
