"""Masks that no gradient prints alone: least absolute deviations from block 0's span.

Chapter `14_defences`.

A masked sum of embeddings lies in the span of block 0, up to the gain and the mean of the norm. The whole sum differs
from it at the masked coordinates only, one in ten; and the combination of the span with the least absolute deviations
from the sum passes through all others exactly. It is an error-correcting code, and the mask its errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import precise
from dager_tutorial.server.absolute import absolute_residual
from dager_tutorial.server.constants import constants
from dager_tutorial.server.subspace import Span


def embeddings_span(source: FirstInput, span: Span) -> Float[Tensor, "width directions"]:
    """An orthonormal basis (float64) of what masked sums of embeddings are made of.

    Args:
        source: The factors of block 0's attention input.
        span: The span of block 0's query, key and value gradient.
    """
    gain = precise(source.gain)[:, None]
    parts = [precise(span.signal) / gain]
    if source.centred:
        parts.append(torch.ones_like(gain))
    if source.bias is not None and bool(source.bias.any()):
        parts.append(precise(source.bias)[:, None] / gain)
    return torch.linalg.qr(torch.cat(parts, 1)).Q


def likely_pairs(
    source: FirstInput,
    basis: Float[Tensor, "width directions"],
    tokens: Int[Tensor, " some"],
    positions: Int[Tensor, " places"],
    rate: float,
) -> Iterator[tuple[int, int]]:
    """Pairs of a token and a position that may lie in a span but for a mask, the likeliest first.

    Args:
        source: The factors of block 0's attention input.
        basis: float64, of the span.
        tokens: int64.
        positions: int64.
        rate: The share of entries that dropout sets to zero.
    """
    assert source.positions is not None
    pairs = torch.cartesian_prod(tokens, positions).view(-1, 2)
    sums = precise(source.tokens[pairs[:, 0]] + source.positions[pairs[:, 1]])
    outside = 1 - (sums @ basis).square().sum(1) / sums.square().sum(1)
    order = outside.argsort()
    # What a mask leaves outside is about its rate; a false pair leaves several times as much.
    yield from map(tuple, pairs[order[outside[order] <= constants().masked_outside * rate]].tolist())


def mask_of(
    target: Float[Tensor, " width"],
    basis: Float[Tensor, "width directions"],
    found: Bool[Tensor, " width"],
) -> Bool[Tensor, " width"]:
    """Where the combination of a basis with the least absolute deviations from a sum is not the sum but zero.

    Args:
        target: float64, the sum of a token's and a position's embedding.
        basis: float64.
        found: Where masks of the same sum that were found before are zero. These coordinates count more, so that
            another one of its masks costs least.
    """
    costs = torch.where(found, constants().found_before, torch.ones_like(target))
    return absolute_residual(target, basis, costs).abs() > target.abs() / 2
