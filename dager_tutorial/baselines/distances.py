"""How far a simulated gradient is from the one that was received.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Mapping[str, Tensor]
"""Gradients by the update's names."""

Distance = Callable[[Gradients, Gradients], Float[Tensor, ""]]
"""A scalar of simulated and received gradients, twice differentiable in the simulated ones."""


def squared(simulated: Gradients, received: Gradients) -> Float[Tensor, ""]:
    """The sum of squared differences of all entries: DLG's distance.

    Args:
        simulated: Gradients of a guess.
        received: Gradients of the update, of the same names.

    Example:
        >>> squared({"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([1.0, 2.0])})
        tensor(9.)
    """
    return _total((simulated[name] - received[name]).square().sum() for name in received)


def absolute(simulated: Gradients, received: Gradients) -> Float[Tensor, ""]:
    """The sum of absolute differences of all entries.

    Args:
        simulated: Gradients of a guess.
        received: Gradients of the update, of the same names.
    """
    return _total((simulated[name] - received[name]).abs().sum() for name in received)


def squared_and_absolute(weight: float) -> Distance:
    """The sum of squared differences and so many times that of absolute ones: TAG's distance.

    Args:
        weight: Of the absolute differences.
    """
    return lambda simulated, received: squared(simulated, received) + weight * absolute(simulated, received)


def cosine(simulated: Gradients, received: Gradients) -> Float[Tensor, ""]:
    """One minus the cosine, tensor by tensor, the mean over the tensors: LAMP's distance. Scale means nothing to it.

    Args:
        simulated: Gradients of a guess.
        received: Gradients of the update, of the same names.

    Example:
        >>> cosine({"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])})
        tensor(1.)
    """
    return _total(_angle(simulated[name], received[name]) for name in received) / len(received)


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """One minus the cosine of two tensors; a tensor of zeros points nowhere."""
    norms = one.square().sum().clamp(min=torch.finfo(one.dtype).tiny).sqrt() * other.norm()
    return 1 - (one * other).sum() / norms.clamp(min=torch.finfo(one.dtype).tiny)


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(parts)).sum()
