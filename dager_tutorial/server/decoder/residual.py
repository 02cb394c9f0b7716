"""Extensions whose vectors lie in the spans of the update, by a cascade of tests, the cheapest first.

Chapter `06_decoder_recovery`.

The input of block 0's attention output map needs no MLP and is decided on a few directions of the complement; then the
input of block 0's MLP, then block 1's queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, FirstBlock, Front
from dager_tutorial.server.decoder.selector import Chosen
from dager_tutorial.server.subspace import Span


class ResidualSelector:
    """Keeps the extensions that pass every span test.

    Where more of them pass than the rank allows the tests have no power left, and the search stops.

    Args:
        adapter: The architecture.
        spans: Spans of block 0's attention output and MLP and of block 1's query, key and value, those that there are.
        budget: What it may cost.
        counted: Whether a clear rank tells how many rows there are.
    """

    certain = True

    def __init__(
        self, adapter: DecoderAdapter, spans: Mapping[Tap, Span], budget: Budget, *, counted: bool = False
    ) -> None:
        self.attention = spans.get(adapter.tap(0, ATTENTION_OUTPUT))
        self.mlp = spans.get(adapter.tap(0, MLP))
        self.next_block = spans.get(adapter.tap(1, QKV)) if adapter.num_blocks > 1 else None
        directions = None
        if self.attention is not None:
            directions = self.attention.screen(constants().search_directions, budget.generator())
        self.block = FirstBlock.screened(adapter, directions, budget)
        # Different rows of one length are independent, so that more than the rank cannot be true.
        self.widest = max((span.rank for span in spans.values()), default=adapter.hidden_size)
        limit = constants().longest_repeat if counted else constants().longest_repeat_in_noise
        self.longest_repeat = min(limit, adapter.max_positions - 1)

    def select(self, front: Front, extension: Extension) -> Chosen:
        """Choose the extensions that pass every span test."""
        passed = [self._confirmed(front, extension, self.block.beginnings(extension))]
        if front.nodes:
            passed.append(self._confirmed(front, extension, self._screened(front, extension)))
        pairs, ratios = zip(*passed, strict=True)
        return Chosen(torch.cat(pairs), torch.cat(ratios))

    def _screened(self, front: Front, extension: Extension) -> Int[Tensor, "pairs 2"]:
        """Pairs whose attention output may lie in the span."""
        everyone = torch.ones(len(front.nodes), len(extension.tokens), dtype=torch.bool, device=front.keys.device)
        if self.attention is not None:
            limit = constants().screen_slack * self.attention.worst * self._largest(front, extension)
            for places in self.block.chunks(front, extension):
                everyone[places] = self.block.screen(front, extension, places) <= limit**2
        return everyone.nonzero()

    def _largest(self, front: Front, extension: Extension) -> float:
        """The longest that an attention output can be: a mean of values, head by head."""
        squares = (front.values.square().sum((2, 3)).max(), extension.value.square().sum((1, 2)).max())
        groups = self.block.adapter.num_heads // self.block.adapter.num_key_heads
        return (groups * max(square.item() for square in squares)) ** 0.5

    def _confirmed(self, front: Front, extension: Extension, pairs: Int[Tensor, "pairs 2"]) -> Chosen:
        """Those of the pairs that pass the whole cascade."""
        kept, ratios = [pairs[:0]], [extension.hidden.new_empty(0)]
        for part, attended in self.block.of_pairs(front, extension, pairs):
            passed, ratio = self._cascade(extension.hidden[pairs[part, 1]], attended)
            kept.append(pairs[part[passed]])
            ratios.append(ratio)
        return Chosen(torch.cat(kept), torch.cat(ratios))

    def _cascade(
        self, hidden: Float[Tensor, "rows width"], attended: Float[Tensor, "rows inputs"]
    ) -> tuple[Int[Tensor, " passed"], Float[Tensor, " passed"]]:
        """Rows that pass every test that can be made, and their largest ratios."""
        adapter = self.block.adapter
        passed = torch.arange(len(hidden), device=hidden.device)
        good, worst = _tested(self.attention, attended, hidden.new_zeros(len(hidden)))
        passed, hidden = passed[good], adapter.after_attention(0, hidden[good], attended[good])
        inner = adapter.mlp_input(0, hidden)
        good, worst = _tested(self.mlp, inner, worst)
        passed, hidden, inner = passed[good], hidden[good], inner[good]
        if self.next_block is None:
            return passed, worst
        vectors = adapter.attention_input(1, adapter.after_mlp(0, hidden, inner))
        good, worst = _tested(self.next_block, vectors, worst)
        return passed[good], worst


def _tested(span: Span | None, vectors: Tensor, worst: Tensor) -> tuple[Tensor, Tensor]:
    """Which vectors pass a span (all, where there is none), and the largest ratios so far of those."""
    if span is None:
        return torch.ones_like(worst, dtype=torch.bool), worst
    ratio = span.ratio(vectors)
    good = ratio <= span.bound
    return good, torch.maximum(worst, ratio)[good]
