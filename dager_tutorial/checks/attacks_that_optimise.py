"""Checks of chapter `02_attacks_that_optimise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed


def matching_step(function: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, float], Tensor]) -> None:
    """Exercise "a step of matching": a guess moved once down the squared distance of its gradient.

    Args:
        function: Takes a function from inputs (rows x inputs) to a gradient, the guess, the received gradient and the
            step's length; returns the moved guess.
    """
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        guess, truth, weight = (torch.randn(size, generator=draw) for size in ((2, 3), (2, 3), (3, 4)))

        def gradient(inputs: Tensor, weight: Tensor = weight) -> Tensor:
            return inputs.T @ (inputs @ weight).tanh()

        received, start = gradient(truth), guess.clone().requires_grad_()
        distance = (gradient(start) - received).square().sum()
        (slope,) = torch.autograd.grad(distance, start)
        found = answer(function, gradient, guess, received, 0.1)
        close(found.detach(), guess - 0.1 * slope, "the moved guess", hint="Down the slope of the squared distance.")
    passed(function)


def nearest_tokens(function: Callable[[Tensor, Tensor], Sequence[int]]) -> None:
    """Exercise "nearest tokens": for each vector the row of a table that points most nearly its way.

    Args:
        function: Takes vectors (rows x width) and a table (vocabulary x width); returns indices.
    """
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        table = torch.randn(9, 5, generator=draw)
        table[0] *= 30  # a long row has large products with anything
        wanted = [4, 2, 7]
        vectors = 20 * table[wanted] + 0.1 * torch.randn(3, 5, generator=draw)
        found = [int(index) for index in answer(function, vectors, table)]
        equal(found, wanted, "the tokens", hint="Compare directions: divide by the norms of the table's rows.")
    passed(function)


def cosine_distance(function: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
    """Exercise "LAMP's distance": the mean over tensors of one minus the cosine.

    Args:
        function: Takes two lists of gradients of the same shapes; returns a scalar tensor.
    """
    draw = torch.Generator().manual_seed(0)
    one = [torch.randn(3, 4, generator=draw), 1e-3 * torch.randn(5, generator=draw)]
    other = [2 * one[0], -one[1]]
    found = answer(function, one, other)
    close(
        torch.as_tensor(found), torch.tensor(1.0), "the distance", hint="Each tensor counts alike, whatever its size."
    )
    close(torch.as_tensor(answer(function, one, one)) + 1, torch.tensor(1.0), "the distance to itself, plus one")
    passed(function)
