"""When the rank is full: prefixes grown by the evidence of all taps, weighed and summed (chapter `11_limits`).

With as many distinct prefixes as the model is wide no vector lies outside the spans any more. Leverages still tell:
one tap little, all taps together, each weighed by what it was worth on a simulated batch, nearly everything.

A prefix may have gone wrong at any of its tokens. If it did at token q, its row there is a wrong extension and each
later row that of a copy with one token exchanged. Its log-odds are therefore the worst, over q, of the extension's
log-odds at q plus what the rows behind q say, which a running minimum follows from token to token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, FirstBlock
from dager_tutorial.server.decoder.passage import Cache, Passage, Prefix, Rows
from dager_tutorial.server.decoder.summed.sketch import Sketch
from dager_tutorial.server.decoder.summed.weighing import Judges, Scale, screened
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates


@dataclass(frozen=True)
class Front:
    """Prefixes of one length.

    Attributes:
        prefixes: Their tokens.
        odds: float32, for each the log-odds that it went wrong nowhere.
        cache: Their keys and values.
    """

    prefixes: tuple[Prefix, ...]
    odds: Float[Tensor, " prefixes"]
    cache: Cache


@dataclass
class Found:
    """What a search came upon.

    Attributes:
        ends: Prefixes at which the last block has a row: each with its residual ratio over the bound.
        grown: Every prefix that was kept, with its log-odds.
    """

    ends: dict[Prefix, float] = field(default_factory=dict)
    grown: dict[Prefix, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """What is looked for: where texts end, and when to stop.

    Attributes:
        end: The span that tells where texts end, of the last block's attention output; None where none does.
        texts: How many ends there are, about.
        longest: The length up to which a first end may be waited for.
    """

    end: Span | None
    texts: int
    longest: int

    def reached(self, found: Found, position: int) -> bool:
        """Whether going on makes no sense: all ends were found, or none for long.

        Rows behind a text's end are in no gradient: what is grown there is chance, and ends of longer texts are found
        more surely once those that are known are taken off.
        """
        last = max(map(len, found.ends), default=self.longest)
        return len(found.ends) >= self.texts or position > last + constants().patience


@dataclass(frozen=True)
class Scales:
    """What evidence of false extensions usually is at a position.

    Attributes:
        all: Of all taps.
        screen: As the sketch sees it.
    """

    all: Scale
    screen: Scale


@dataclass(frozen=True)
class SummedSearch:
    """Grows prefixes whose evidence, summed over all taps, stands out.

    Attributes:
        passage: The blocks and the taps that are read in them.
        judges: What the evidence is worth.
        sketch: The quick look at every extension; None where block 0's MLP was not shared.
        goal: Where texts end, and when to stop.
        candidates: Tokens that may stand at each position.
        budget: What the search may cost.
    """

    passage: Passage
    judges: Judges
    sketch: Sketch | None
    goal: Goal
    candidates: Candidates
    budget: Budget
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(self) -> Found:
        """Grow until no prefix stands out any more."""
        adapter, found = self.passage.adapter, Found()
        front = Front(((),), adapter.first_input.tokens.new_full((1,), math.inf), self.passage.empty())
        measured, scales = 0, self._usual(front, 0)
        for position in range(adapter.max_positions):
            tokens = self.candidates.at(position)
            if not len(tokens) or not front.prefixes or self.budget.late or self.goal.reached(found, position):
                break
            if position + 1 > constants().usual_for * (measured + 1):
                measured, scales = position, self._usual(front, position)
            front = self._step(front, tokens, position, scales, found)
            found.grown.update(zip(front.prefixes, front.odds.tolist(), strict=True))
            self.budget.report("search", len(found.grown))
        return found

    def _step(self, front: Front, tokens: Tensor, position: int, scales: Scales, found: Found) -> Front:
        """The front one token longer."""
        rows = self._screened(front, tokens, position, scales.screen)
        count = max(len(front.prefixes), constants().fewest_prefixes)
        for halves, most in self.stages(self.passage.halves):
            rows = self.passage.through(rows, front.cache, halves)
            odds = self._extension(rows, scales.all)
            rows = rows.take(_best(odds, most * count, -constants().doubtful_odds))
        odds = self._odds(front, rows, scales.all)
        self._note_ends(front, rows, found)
        # As many as there are texts left may be doubtful: what is usual at a position shifts all odds alike.
        doubtful = 0 if self.goal.end is None else max(0, self.goal.texts - len(found.ends))
        chosen = _best(odds, constants().widest, -constants().doubtful_odds)
        chosen = torch.cat([chosen[:doubtful], _above(odds, chosen[doubtful:], constants().least_odds)])
        if position < len(self.candidates.prompt):
            odds, chosen = torch.full_like(odds, math.inf), torch.arange(len(odds), device=odds.device)
        kept = rows.take(chosen)
        return Front(tuple(kept.named(front.prefixes)), odds[chosen], self.passage.grown(front.cache, kept))

    @staticmethod
    def stages(all_halves: int) -> list[tuple[int, int]]:
        """After how many half blocks extensions are judged, and how many of each prefix go on at most.

        Args:
            all_halves: How many half blocks there are.
        """
        early = [(1, constants().through_attention), (2, constants().through_block), (6, constants().through_blocks)]
        return [
            *((halves, most) for halves, most in early if halves < all_halves),
            (all_halves, constants().through_blocks),
        ]

    def _extension(self, rows: Rows, scale: Scale) -> Tensor:
        """Log-odds of the extensions by the taps so far."""
        features = rows.features()
        return self.judges.extension[features.shape[1]].log_odds(scale.deviations(features))

    def _odds(self, front: Front, rows: Rows, scale: Scale) -> Tensor:
        """Log-odds of the extended prefixes by all taps."""
        history = self.judges.history.log_odds(scale.deviations(rows.features()))
        return torch.minimum(self._extension(rows, scale), front.odds[rows.places] + history)

    def _usual(self, front: Front, position: int) -> Scales:
        """What log-shares extensions have that are hardly ever true: any token of the batch, after any prefix."""
        features = self.passage.random(front.cache, self.candidates.distinct(), position, self.generator).features()
        return Scales(Scale.of(features), Scale.of(screened(features, list(self.passage.readers))))

    def _screened(self, front: Front, tokens: Tensor, position: int, scale: Scale) -> Rows:
        """The extensions of each prefix that look best."""
        extension = self._block.extension(position, tokens)
        repeats, parts = self._repeats(front, tokens), []
        for place in range(len(front.prefixes)):
            shares = self.passage.shares(extension, front.cache, place)
            odds = self._quick(extension, shares, front, place, scale).masked_fill(repeats[place], -math.inf)
            choice = _best(odds, constants().screened if position else len(tokens))
            parts.append(self.passage.begin(extension, shares, front.cache, place, choice))
        return Rows.joined(parts)

    def _quick(self, extension: Extension, shares: Tensor, front: Front, place: int, scale: Scale) -> Tensor:
        """Log-odds of all candidates behind a prefix, as the sketch sees them; all alike where there is none."""
        if self.sketch is None:
            return torch.zeros_like(extension.hidden[:, 0])
        past = front.cache.values[0][place, self.passage.seen(0, extension.position)]
        return self.judges.screen.log_odds(scale.deviations(self.sketch.log_shares(extension, shares, past)))

    @property
    def _block(self) -> FirstBlock:
        """Block 0, whose values are seen by the sketch."""
        adapter = self.passage.adapter
        if self.sketch is None:
            return FirstBlock.screened(adapter, None, self.budget)
        return FirstBlock(adapter, self.sketch.heads, self.budget)

    def _repeats(self, front: Front, tokens: Int[Tensor, " candidates"]) -> Bool[Tensor, "prefixes candidates"]:
        """Extensions that repeat a rotary model's first token: one row at every length, which would never end."""
        repeated = torch.zeros(len(front.prefixes), len(tokens), dtype=torch.bool, device=tokens.device)
        if self.candidates.every_position:
            for place, prefix in enumerate(front.prefixes):
                if prefix and len(set(prefix)) == 1:
                    repeated[place] = tokens == prefix[0]
        return repeated

    def _note_ends(self, front: Front, rows: Rows, found: Found) -> None:
        """Enter the prefixes at which the last block has a row; first tokens prove nothing."""
        if self.goal.end is None or rows.attended is None or not rows.position:
            return
        ratios = self.goal.end.ratio(rows.attended) / self.goal.end.bound
        passing = (ratios <= 1).nonzero()[:, 0]
        found.ends.update(zip(rows.take(passing).named(front.prefixes), ratios[passing].tolist(), strict=True))


def _above(odds: Tensor, chosen: Tensor, least: float) -> Tensor:
    return chosen[odds[chosen] > least]


def _best(odds: Float[Tensor, " rows"], most: int, least: float = -math.inf) -> Int[Tensor, " best"]:
    """Indices of the best rows, best first, those above a limit."""
    order = odds.argsort(descending=True)[:most]
    return _above(odds, order, least)
