"""What a client that took many steps did to the vectors that make up its update: they moved on the way.

Chapter `12_federated`.

A weight difference is a sum of gradients, each computed at other weights. The server knows the first weights and, by
the difference, the last: vectors computed halfway are off by a part of the way, and how long the way is it measures by
sending random texts through both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.streaming import is_streamed
from dager_tutorial.models.tap import MLP_OUTPUT, Tap
from dager_tutorial.models.training import own_copy
from dager_tutorial.server.constants import constants
from dager_tutorial.server.rounding import probe


def halfway(adapter: Adapter, delta: Mapping[str, Tensor]) -> tuple[Adapter, dict[Tap, float]]:
    """The model halfway between a client's first and last weights, and how far the inputs of every tap moved.

    Args:
        adapter: The architecture with the weights that the server handed out.
        delta: New weights minus old weights, by backbone parameter name; what is missing did not move, or is not known.

    Returns:
        The architecture with the weights halfway, in memory of its own (that of a model read from disk as it is); and,
        for every tap, the length of the difference over the vectors' length, on random texts.
    """
    if is_streamed(adapter.network):
        return adapter, {}
    ids = probe(adapter, constants().probe_texts, constants().drift_length, seed=2)
    taps = [*adapter.taps(), *(adapter.tap(block, MLP_OUTPUT) for block in range(adapter.num_blocks))]
    before = adapter.tap_inputs(ids, torch.ones_like(ids), taps)
    moved = own_copy(adapter.network, adapter.network.dtype)
    _move(moved, adapter.network, delta, share=1.0)
    after = adapter_for(moved).tap_inputs(ids, torch.ones_like(ids), taps)
    drifts = {tap: float((after[tap] - before[tap]).norm() / before[tap].norm().clamp(min=1e-30)) for tap in taps}
    _move(moved, adapter.network, delta, share=0.5)
    return adapter_for(moved), drifts


@torch.no_grad()
def _move(network: PreTrainedModel, start: PreTrainedModel, delta: Mapping[str, Tensor], share: float) -> None:
    """Put a network on the way from the weights of another along a difference."""
    own = dict(network.named_parameters())
    for name, parameter in start.named_parameters():
        if name in delta:
            own[name].copy_(torch.add(parameter, delta[name].to(parameter), alpha=share))


def unmoved(delta: Mapping[str, Tensor], read: set[str]) -> float:
    """The share of a weight difference's entries that are exactly zero: their steps were lost in rounding.

    Args:
        delta: New weights minus old weights, by backbone parameter name.
        read: Names of the parameters that count.
    """
    chosen = [delta[name] for name in read if name in delta]
    total = sum(each.numel() for each in chosen)
    return sum(each.numel() - int(each.count_nonzero()) for each in chosen) / max(total, 1)


def evenness(delta: Mapping[str, Tensor], read: set[str]) -> float:
    """How alike the sizes of a weight difference's entries are: 1 where all that moved did so by the same amount.

    Adam's first step moves every weight by the learning rate, whatever the size of its gradient: signs are left of it.
    The squares of gradients' entries spread over orders of magnitude, and few steps of SGD leave them so.

    Args:
        delta: New weights minus old weights, by backbone parameter name.
        read: Names of the parameters that count.

    Returns:
        Squared mean over mean square of the sizes that are not zero, the median over parameters; 0 where none moved.
    """
    sizes = [delta[name].float().abs() for name in sorted(read & delta.keys())]
    moved = [each[each > 0] for each in sizes if bool(each.any())]
    shares = sorted(float(each.mean() ** 2 / each.square().mean()) for each in moved)
    return shares[len(shares) // 2] if shares else 0.0


def undecayed(table: Float[Tensor, "rows width"], delta: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """What an embedding's difference is without weight decay, which moves every row in proportion to itself.

    Args:
        table: The embedding, as the server handed it out.
        delta: Its difference.

    Returns:
        The difference, rows in which rounding alone is left set to zero; as it is where few rows moved, or most did for
        another reason.
    """
    if 2 * int(delta.any(1).sum()) <= len(delta):
        return delta
    weights = table.to(delta)
    lost = (delta * weights).sum(1) / weights.square().sum(1).clamp(min=1e-30)
    rest = delta - lost.median() * weights
    rounding = constants().clear_gap * torch.finfo(torch.float32).eps * weights.norm(dim=1)
    moved = rest.norm(dim=1) > rounding
    return torch.where(moved[:, None], rest, 0.0) if 2 * int(moved.sum()) <= len(delta) else delta
