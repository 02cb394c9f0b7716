"""Where no gap stands below the signal: how much better extensions fit than false ones do.

Chapter `12_federated`.

Without a gap the span tests pass true rows and many false ones with them, or fail weak true rows. What still tells is
the order: a row's residual at a tap against those of random extensions of the same prefixes, in robust deviations,
summed over the taps of the first blocks. The first block tells least, since every token of the batch lies near its
spans; a few blocks further a row has mixed with those before it. The input of the MLP's output map has several times
as many entries as the model is wide, so that there is room outside however many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, FirstBlock
from dager_tutorial.server.decoder.passage import Cache, Passage, Rows
from dager_tutorial.server.decoder.summed.weighing import Scale
from dager_tutorial.server.odds import usual
from dager_tutorial.server.subspace import Span


def ranked_taps(adapter: DecoderAdapter, blocks: int) -> list[Tap]:
    """The taps by which extensions are ranked: of the first blocks, in the order of the forward pass.

    What enters block 0 has chosen the candidates. Of the last block only its input counts: behind it, a loss on the
    texts' ends has rows of nothing else. What enters an MLP's output map is the widest, and tells least where a further
    block is read.

    Args:
        adapter: The architecture.
        blocks: How many blocks extensions go through.
    """
    inner = range(min(blocks, adapter.num_blocks - 1))
    if not inner:
        return [adapter.tap(0, ATTENTION_OUTPUT)]
    taps = [adapter.tap(block, kind) for block in inner for kind in (QKV, ATTENTION_OUTPUT, MLP)]
    return [*taps[1:], adapter.tap(inner[-1], MLP_OUTPUT), adapter.tap(len(inner), QKV)]


@dataclass(frozen=True)
class Misfit:
    """Reads a tap by its span.

    Attributes:
        span: The span.
    """

    span: Span

    def __call__(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows 1"]:
        """How badly vectors fit: the logarithm of the residual, or of the leverage where there is no residual."""
        if self.span.saturated:
            return self.span.log_leverage(vectors)[:, None]
        return self.span.ratio(vectors).clamp(min=1e-30, max=1e30).log()[:, None]


@dataclass
class Worth:
    """What the evidence of each tap was worth so far: that of rows that stood out, summed.

    Attributes:
        taps: How many taps there are.
        seen: float32, one entry a tap; None before any row stood out.
    """

    taps: int
    seen: Float[Tensor, " taps"] | None = None

    def weights(self, like: Tensor) -> Float[Tensor, " taps"]:
        """The weights of the taps."""
        return like.new_ones(self.taps) if self.seen is None else self.seen.clamp(min=0).to(like)

    def learn(self, deviations: Float[Tensor, "rows taps"]) -> None:
        """Add rows that stood out; no single one may count for more than a limit.

        Args:
            deviations: How they deviate from false rows, negative where they fit better.
        """
        most = constants().leverage_shift
        found = -deviations.clamp(-most, most).sum(0)
        self.seen = found if self.seen is None else self.seen + found


@dataclass(frozen=True)
class Chance:
    """What misfits false extensions have at one position.

    Attributes:
        centre: float32, their medians.
        spread: float32, their robust deviations.
        deviations: float32, of the false extensions themselves.
        weights: float32, what the taps are worth.
    """

    centre: Float[Tensor, " taps"]
    spread: Float[Tensor, " taps"]
    deviations: Float[Tensor, "false taps"]
    weights: Float[Tensor, " taps"]

    @classmethod
    def of(cls, false: Float[Tensor, "false taps"], weights: Float[Tensor, " taps"]) -> Chance:
        """Measure a sample of false extensions, of which a few may be anything."""
        scale = Scale.of(false)
        return cls(scale.centre, scale.spread, (false - scale.centre) / scale.spread, weights)

    def deviating(self, misfits: Float[Tensor, "rows known"]) -> Float[Tensor, "rows known"]:
        """By how many deviations rows fit worse (negative: better) at the taps known so far."""
        known = misfits.shape[1]
        return (misfits - self.centre[:known]) / self.spread[:known]

    def evidence(self, misfits: Float[Tensor, "rows known"]) -> Float[Tensor, " rows"]:
        """By how many deviations rows fit better than false ones, the taps known so far weighed by their worth."""
        weights = self.weights[: misfits.shape[1]]
        of_false = usual(self.deviations[:, : len(weights)] @ weights)
        return -of_false.deviations(self.deviating(misfits) @ weights)


@dataclass(frozen=True)
class Ranking:
    """Weighs extensions at the taps of the first blocks.

    Attributes:
        passage: The first blocks, with a `Misfit` for each tap that was shared.
        batch_tokens: int64, tokens that are usual in the batch.
        generator: Source of randomness, on the CPU.
        worth: What the taps were worth so far.
    """

    passage: Passage
    batch_tokens: Int[Tensor, " tokens"]
    generator: torch.Generator
    worth: Worth = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is known of the taps' worth yet."""
        object.__setattr__(self, "worth", Worth(len(self.passage.readers)))

    @property
    def rotary(self) -> bool:
        """Whether positions enter in the attention only."""
        return self.passage.adapter.first_input.positions is None

    def misfits(self, rows: Rows) -> Float[Tensor, "rows known"]:
        """How badly extensions fit at the taps so far, beyond what their tokens do behind any prefix.

        Tokens with strong rows of their own seem to fit everywhere; so do those that the batch holds often, rightly:
        only a part of it is taken off. What enters a text's first place is like nothing else, and is not compared.

        Args:
            rows: The extensions.
        """
        found = rows.features()
        if not rows.position:
            return found
        places = torch.searchsorted(self.batch_tokens, rows.tokens).clamp(max=len(self.batch_tokens) - 1)
        known = (self.batch_tokens[places] == rows.tokens)[:, None]
        return found - constants().anyway * torch.where(known, self._anyway[places, : found.shape[1]], 0.0)

    @cached_property
    def _anyway(self) -> Float[Tensor, "tokens taps"]:
        """How much worse than others each of the batch's tokens fits behind random prefixes; 0 where they are many."""
        passage, tokens = self.passage, self.batch_tokens
        count = min(constants().null_texts, constants().familiar_rows // len(tokens))
        if not count:
            return passage.adapter.first_input.tokens.new_zeros(len(tokens), len(passage.readers))
        cache, places = passage.empty(), torch.zeros(count, dtype=torch.long, device=tokens.device)
        length = min(constants().null_length, passage.adapter.max_positions - 1)
        for position in range(length):
            draws = torch.randint(len(tokens), (count,), generator=self.generator).to(tokens.device)
            rows = passage.through(passage.enter(places, tokens[draws], position), cache, passage.halves)
            cache, places = passage.grown(cache, rows), torch.arange(count, device=tokens.device)
        each = (passage.enter(place.expand(len(tokens)), tokens, length) for place in places)
        found = torch.stack([passage.through(rows, cache, passage.halves).features() for rows in each]).median(0).values
        return found - found.median(0).values

    def chance(self, cache: Cache, position: int) -> Chance:
        """How badly extensions fit that are hardly ever true: the batch's tokens after any prefix.

        Args:
            cache: Keys and values of the prefixes.
            position: Where the tokens stand.
        """
        sample, device = constants().ranked_sample, self.batch_tokens.device
        draws = torch.randint(len(self.batch_tokens), (sample,), generator=self.generator)
        places = torch.randint(len(cache.keys[0]), (sample,), generator=self.generator).sort().values
        rows = self.passage.enter(places.to(device), self.batch_tokens[draws.to(device)], position)
        false = self.misfits(self.passage.through(rows, cache, self.passage.halves))
        return Chance.of(false, self.worth.weights(false))

    def promising(
        self,
        cache: Cache,
        begun: Int[Tensor, " prefixes"],
        position: int,
        tokens: Int[Tensor, " candidates"],
        chance: Chance,
    ) -> Rows:
        """The extensions of each prefix that fit best, behind all blocks; fewer are left after each stage.

        A first token says too little in the first taps: of those only as many are left out as would cost too much.

        Args:
            cache: Keys and values of the prefixes.
            begun: int64, their first tokens; empty before there are any.
            position: Where the tokens stand.
            tokens: The candidates.
            chance: See `chance`.
        """
        most, fewer = constants().ranked, constants().ranked_deep
        if not position:
            most = fewer = constants().ranked_first
        extension = FirstBlock.screened(self.passage.adapter, None, self.passage.budget).extension(position, tokens)
        rows = self._attended(cache, begun, extension, chance, most)
        rows = self.passage.through(rows, cache, min(3, self.passage.halves))
        rows = rows.take(_best_of_each(rows.places, chance.evidence(self.misfits(rows)), fewer))
        return self.passage.through(rows, cache, self.passage.halves)

    def _attended(self, cache: Cache, begun: Tensor, extension: Extension, chance: Chance, most: int) -> Rows:
        """The extensions of each prefix that fit best behind block 0's attention.

        Where a further block tells far more, it judges all of a glance.
        """
        parts = []
        for place in range(len(cache.keys[0])):
            # A rotary model's first token repeated has the same state at every length, and would never end.
            barred = self.rotary and extension.position == 1
            allowed = extension.tokens != begun[place] if barred else torch.ones_like(extension.tokens)
            shares = self.passage.shares(extension, cache, place)
            choice = self._glanced(cache, extension, shares, place, allowed.nonzero()[:, 0], constants().glances * most)
            rows = self.passage.begin(extension, shares, cache, place, choice)
            if self.passage.depth == 1:
                rows = rows.take(_best_of_each(rows.places, chance.evidence(self.misfits(rows)), most))
            parts.append(rows)
        return Rows.joined(parts)

    def _glanced(
        self, cache: Cache, extension: Extension, shares: Tensor, place: int, choice: Tensor, most: int
    ) -> Int[Tensor, " choice"]:
        """The candidates behind one prefix that fit best where they enter block 0's MLP, a few times too many.

        What enters attention's output map is a mean of values: often more of other tokens' than of the last one's.
        """
        taps = [self.passage.adapter.tap(0, kind) for kind in (MLP, ATTENTION_OUTPUT)]
        seen = [tap for tap in taps if tap in self.passage.readers]
        if not seen or len(choice) <= most:
            return choice
        glance = replace(self.passage, readers={seen[0]: self.passage.readers[seen[0]]})
        entry = 24 * self.passage.adapter.hidden_size
        parts = choice.split(self.passage.budget.chunk(entry))
        misfits = torch.cat([glance.begin(extension, shares, cache, place, part).features()[:, 0] for part in parts])
        return choice[misfits.topk(min(most, len(choice)), largest=False).indices]


def _best_of_each(places: Int[Tensor, " rows"], evidence: Float[Tensor, " rows"], most: int) -> Int[Tensor, " best"]:
    """Indices of the rows with the most evidence, so many of each place at most, those of a place together."""
    order = evidence.argsort(descending=True)
    order = order[places[order].argsort(stable=True)]
    counts = torch.unique_consecutive(places[order], return_counts=True)[1]
    begins = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[torch.arange(len(order), device=order.device) - begins < most]


def near_best(places: Int[Tensor, " rows"], evidence: Float[Tensor, " rows"], share: float) -> Bool[Tensor, " rows"]:
    """Which rows have about as much evidence as the best one of the same prefix.

    Args:
        places: int64, the prefix of each row.
        evidence: Of each row.
        share: How much of the best one's a row needs.
    """
    best = evidence.new_full((int(places.max()) + 1,), -torch.inf)
    best = best.scatter_reduce(0, places, evidence, "amax")[places]
    return evidence >= torch.minimum(best, share * best)
