"""What it takes to compute gradients of a network that both sides hold frozen.

Chapters `01_gradients_leak` and `09_completion`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.streaming import absent, is_absent


def in_dtype(network: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The network itself when it has the dtype, else a copy with converted parameters.

    Args:
        network: The headless model.
        dtype: The dtype to train in.
    """
    return network if network.dtype == dtype else own_copy(network, dtype)


def own_copy(network: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the network with converted parameters, none of which requires a gradient.

    Buffers keep their dtype: transformers holds rotary frequencies in float32 whatever the weights are.

    Args:
        network: The headless model.
        dtype: The dtype to train in.
    """
    converted: dict[int, Any] = {
        id(parameter): nn.Parameter(_converted(parameter.detach(), dtype), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, converted)  # a memo: these take the place of copies of the originals


def _converted(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in a dtype, in memory of their own; those that are out of memory stay out."""
    return absent(parameter, dtype) if is_absent(parameter) else parameter.to(dtype, copy=True)


def filled(
    rows: Sequence[Sequence[int]], value: int, *, side: str, device: torch.device
) -> Int[Tensor, "batch length"]:
    """The rows as one tensor (int64), filled up to the longest with a value.

    Args:
        rows: At least one.
        value: What fills them.
        side: Where: `right` or `left`.
        device: Where the tensor goes.
    """
    longest = max(map(len, rows))
    fills = [[value] * (longest - len(row)) for row in rows]
    whole = [[*row, *fill] if side == "right" else [*fill, *row] for row, fill in zip(rows, fills, strict=True)]
    return torch.tensor(whole, device=device)


def filled_and_masked(
    rows: Sequence[Sequence[int]], value: int, *, side: str = "right", device: torch.device
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """The same, and the attention mask (int64): 1 where a row is, 0 where it is filled up.

    Args:
        rows: See `filled`.
        value: See `filled`.
        side: See `filled`.
        device: See `filled`.
    """
    mask = filled([[1] * len(row) for row in rows], 0, side=side, device=device)
    return filled(rows, value, side=side, device=device), mask


@contextmanager
def requiring_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let just these parameters require a gradient for a while.

    Args:
        parameters: Parameters by name.
    """
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
