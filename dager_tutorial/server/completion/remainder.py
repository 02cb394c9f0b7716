"""What remains of an update, and when so little does that all is explained (chapter `09_completion`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dager_tutorial.server.completion.simulation import Ids, Objective, Simulator
from dager_tutorial.server.constants import constants
from dager_tutorial.server.missing.entries import on_kept
from dager_tutorial.server.missing.quantised import beyond_rounding


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to subtract from: in float32, or float64 where they are.

    Args:
        tensors: By name.
    """
    return {name: each.to(torch.promote_types(each.dtype, torch.float32), copy=True) for name, each in tensors.items()}


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The norm of all numbers together.

    Args:
        tensors: By name.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    5.0
    """
    return math.hypot(*(torch.linalg.vector_norm(tensor.float()).item() for tensor in tensors.values()))


class Remainder(NamedTuple):
    """What simulated texts leave of an update.

    Attributes:
        tensors: By the update's names, in float32 or, where the update has it, float64.
        share: Their norm over that of the update, over all parameters that were shared and simulated.
    """

    tensors: dict[str, Tensor]
    share: float


def remainder_of(
    simulator: Simulator, received: Mapping[str, Tensor], texts: Sequence[Ids], objective: Objective
) -> Remainder:
    """Simulate texts and take their gradient off an update.

    Args:
        simulator: Repeats the client's step.
        received: The update's gradients by its names.
        texts: Token ids.
        objective: The client's loss on them.
    """
    shared = {name: received[name] for name in simulator.shared}
    rest = _less(simulator, widened(shared), shared, texts, objective)
    bits = simulator.sent[0]
    left = norm(rest) if bits is None else beyond_rounding(rest, shared, bits)
    return Remainder(rest, left / norm(shared))


class Scaled(NamedTuple):
    """What simulated texts leave of an update whose tensors were multiplied by numbers that nobody told.

    Attributes:
        share: The norm of what is left over that of the update.
        least: The smallest of the factors.
        most: The largest of them.
    """

    share: float
    least: float
    most: float


def scaled_remainder_of(
    simulator: Simulator, received: Mapping[str, Tensor], texts: Sequence[Ids], objective: Objective
) -> Scaled:
    """Simulate texts and compare them with a clipped update, each tensor times the factor that leaves least of it.

    A factor for millions of numbers makes up for no text that is missing, and none is negative.

    Args:
        simulator: Repeats the client's step.
        received: The update's gradients by its names.
        texts: Token ids.
        objective: The client's loss on them.
    """
    shared = {name: received[name] for name in simulator.shared}
    nothing = {name: torch.zeros_like(each) for name, each in widened(shared).items()}
    minus = _less(simulator, nothing, shared, texts, objective)
    left, factors = [0.0], []
    for name, each in minus.items():
        wanted = shared[name].to(each)
        square = float(each.square().sum(dtype=torch.float64))
        if square:
            factors.append(max(0.0, -float((each * wanted).sum(dtype=torch.float64)) / square))
            wanted = wanted + factors[-1] * each
        left.append(torch.linalg.vector_norm(wanted).item())
    return Scaled(math.hypot(*left) / norm(shared), min(factors, default=0.0), max(factors, default=0.0))


def _less(
    simulator: Simulator,
    tensors: dict[str, Tensor],
    shared: Mapping[str, Tensor],
    texts: Sequence[Ids],
    objective: Objective,
) -> dict[str, Tensor]:
    """Tensors less the gradient of simulated texts, on what was sent: the rest cannot be compared."""
    simulator.subtract(tensors, texts, objective)
    return on_kept(tensors, shared) if simulator.sent[1] else tensors


def explains(unexplained: float, precision: torch.dtype) -> bool:
    """Whether what is left of an update is no more than the client's rounding makes of it.

    In float32 that is a proof. In 16 bits it is not: a single wrong token may hide below.

    Args:
        unexplained: The share that is left.
        precision: The client's.

    >>> explains(1e-6, torch.float32), explains(0.01, torch.float32), explains(0.01, torch.bfloat16)
    (True, False, True)
    """
    return unexplained <= max(constants().certified, constants().rounded * torch.finfo(precision).eps)
