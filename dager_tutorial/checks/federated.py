"""Checks of chapter `12_federated`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

__all__ = ["kept_of_each", "ulp", "without_decay"]


def ulp(function: Callable[[Tensor], Tensor]) -> None:
    """How far float32 numbers are from the next larger ones.

    Args:
        function: Takes weights (float32, any shape, none of them zero); returns their units in the last place.
    """
    draw = torch.Generator().manual_seed(0)
    powers = torch.tensor([[1.0, 0.5], [0.25, 2.0]])
    cases = [
        (powers, "At a power of two: 1 has the unit 2^-23."),
        (torch.tensor([0.1, 0.02, 1.5, 3e-5]), "The unit is 2^-23 times the power of two at or below the weight."),
        (-torch.tensor([0.1, 0.75, 2.5]), "A weight may be negative, its unit is not."),
        (torch.randn(4, 5, generator=draw), "The unit is 2^-23 times the power of two at or below the weight."),
    ]
    for weights, hint in cases:
        size = weights.abs()
        expected = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
        close(answer(function, weights), expected, "the unit in the last place", hint=hint)
    passed(function)


def without_decay(function: Callable[[Tensor, Tensor, float, float, int], Tensor]) -> None:
    """What a weight difference is beside AdamW's weight decay.

    Args:
        function: Takes the difference, the weights before, the learning rate, the decay, and the number of steps;
            returns the difference that is left when the decay is taken off, of the same shape.
    """
    draw = torch.Generator().manual_seed(0)
    for rate, decay, steps in ((0.1, 0.5, 1), (0.1, 0.5, 3), (1e-2, 0.1, 20)):
        before = torch.randn(6, 3, generator=draw, dtype=torch.float64)
        moved = torch.zeros(6, 3, dtype=torch.float64)
        moved[[1, 4]] = torch.randn(2, 3, generator=draw, dtype=torch.float64)
        kept = (1 - rate * decay) ** steps
        found = answer(function, kept * before + moved - before, before, rate, decay, steps)
        hint = f"After {steps} steps (1 - rate * decay)^{steps} of a weight is left; what is missing was taken off."
        close(found, moved, "the difference without decay", hint=hint)
    passed(function)


def kept_of_each(function: Callable[[Sequence[int], Sequence[float], int], Sequence[int]]) -> None:
    """The prefixes that a search keeps which has a beam for each first token.

    Args:
        function: Takes the first token of each prefix, its evidence, and the size of a beam; returns the places of
            those that are kept, in any order.
    """
    cases = [
        ([7, 7, 7, 3], [9.0, 8.0, 7.0, 1.0], 1, {0, 3}, "The weak text with another first token keeps its best."),
        (
            [7, 7, 7, 3],
            [7.0, 9.0, 8.0, 1.0],
            2,
            {1, 2, 3},
            "The best of each first token, in any order.",
        ),
        ([1, 2, 1, 2, 2], [1.0, 5.0, 3.0, 4.0, 6.0], 2, {0, 2, 1, 4}, "Two of each first token."),
        ([5], [0.0], 3, {0}, "Fewer than the beam holds are all kept."),
    ]
    for roots, evidence, size, expected, hint in cases:
        found = answer(function, roots, evidence, size)
        equal(set(map(int, found)), expected, f"kept by beams of {size}", hint=hint)
        equal(len(list(found)), len(expected), f"how many beams of {size} keep", hint="Each place once.")
    passed(function)
