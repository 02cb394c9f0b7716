"""Which tokens may stand at which position: those whose vectors lie in the span of block 0.

Chapter `05_token_filter`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import Adapter
from dager_tutorial.textbook.block_inputs import first_block_inputs, is_rotary
from dager_tutorial.textbook.spans import span_distance

Progress = Callable[[str, int, int | None], None]
"""Called with a stage, what is done of it, and the total or None."""


@torch.no_grad()
def textbook_token_filter(
    adapter: Adapter, basis: Float[Tensor, "width rank"], threshold: float = 1e-5, progress: Progress | None = None
) -> list[Int[Tensor, " _"]]:
    """Test every token of the vocabulary, at one position after the other.

    Args:
        adapter: The architecture.
        basis: float32, the span of block 0's attention inputs.
        threshold: Relative distance from the span below which a vector passes (the paper's tau_1).
        progress: Called with "filter", the number of positions done and None.

    Returns:
        int64 token ids for each position, nearest first, up to the first position without any. The vectors of a
        rotary model are the same at all positions: one test counts for all.
    """
    vocabulary = torch.arange(len(adapter.first_input.tokens), device=basis.device)
    candidates: list[Tensor] = []
    for position in range(adapter.max_positions):
        distances = span_distance(first_block_inputs(adapter, vocabulary, position), basis)
        nearest = distances.argsort()
        passing = nearest[distances[nearest] < threshold]
        if not len(passing):
            break
        candidates.append(passing)
        if progress:
            progress("filter", len(candidates), None)
        if is_rotary(adapter):
            return candidates * adapter.max_positions
    return candidates
