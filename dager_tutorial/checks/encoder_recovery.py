"""Checks of chapter `08_encoder_recovery`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed


def margin(function: Callable[[Tensor], float]) -> None:
    """Exercise "is this corner alone?": the smallest length of a mixture of columns.

    Args:
        function: Takes columns (equations x candidates, float64); returns the smallest length of a mixture of them, a
            number.
    """
    f64 = torch.float64
    hint = "The entries of gamma add up to 1: with gamma = 0 the length is always 0."
    close(_number(function, torch.tensor([[3.0], [4.0]], dtype=f64)), torch.tensor(5.0), "one column", hint=hint)
    opposite = torch.tensor([[1.0, -0.6]], dtype=f64)
    assert float(_number(function, opposite)) < 1e-6, "two columns that point against each other can be mixed to zero"
    hint = "No entry of gamma may be negative."
    close(_number(function, opposite.abs()), torch.tensor(0.6), "two columns that point one way", hint=hint)
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        pair = torch.randn(5, 2, generator=draw, dtype=f64)
        hint = "Is gamma divided by its sum?"
        close(_number(function, pair), _to_segment(*pair.T), "the distance of a segment", tolerance=1e-4, hint=hint)
        close(_number(function, 7 * pair), 7 * _to_segment(*pair.T), "longer columns", tolerance=1e-4, hint=hint)
    passed(function)


def _to_segment(one: Tensor, other: Tensor) -> Tensor:
    """The distance of the origin to the segment between two points."""
    along = other - one
    share = float((-(one @ along) / (along @ along)).clamp(0, 1))
    return (one + share * along).norm()


def _number(function: Callable[..., float], *arguments: Tensor) -> Tensor:
    return torch.as_tensor(answer(function, *arguments), dtype=torch.float64).reshape(())


def newton_step(function: Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]) -> None:
    """Exercise "Newton's step": one step of the barrier method that keeps the sums.

    Args:
        function: Takes the Jacobian (equations x candidates), the equations' values (equations), the weights
            (candidates), the barrier and the sums (positions x candidates), tensors in float64; returns the step
            (candidates).
    """
    for seed, sizes in enumerate(((2, 2), (3, 1, 4), (5, 5, 5))):
        draw = torch.Generator().manual_seed(seed)
        places = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        sums = torch.nn.functional.one_hot(places).T.double()
        weights = 0.1 + torch.rand(len(places), generator=draw, dtype=torch.float64)
        weights = weights / (sums @ weights)[places]
        jacobian = torch.randn(3, len(places), generator=draw, dtype=torch.float64)
        left = torch.randn(3, generator=draw, dtype=torch.float64)
        found = answer(function, jacobian, left, weights, 0.1, sums)
        expected = _step(jacobian, left, weights, 0.1, sums)
        assert isinstance(found, Tensor), f"return a tensor, not {type(found).__name__}"
        assert found.shape == weights.shape, "return the step of the weights only, without the multipliers"
        changed = float((sums @ found).abs().max())
        assert changed < 1e-6, f"the step changes a position's sum by {changed:.2g}: is the lower block row S, 0?"
        close(found, expected, "the step", hint="On the right stands mu / w - J^T F, and in the matrix mu / w**2.")
    passed(function)


def _step(jacobian: Tensor, left: Tensor, weights: Tensor, barrier: float, sums: Tensor) -> Tensor:
    """The same step, solved within the directions that keep all sums."""
    keeping = torch.linalg.svd(sums).Vh[len(sums) :].T
    hessian = jacobian.T @ jacobian + torch.diag(barrier / weights**2)
    downhill = barrier / weights - jacobian.T @ left
    return keeping @ torch.linalg.solve(keeping.T @ hessian @ keeping, keeping.T @ downhill)


def choose(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise "solve for the text": one candidate for each position, from linear equations of their weights.

    Args:
        function: Takes equations (equations x candidates, float64) and the position of each candidate (int64,
            candidates); returns the index of each position's chosen candidate (int64, positions).
    """
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        places = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, 7).repeat_interleave(7)])
        places = places[torch.randperm(len(places), generator=draw)]  # candidates come in any order
        hidden = torch.stack([_one(place, places, draw) for place in range(7)])
        weights = torch.zeros(len(places), dtype=torch.float64)
        weights[hidden] = 1
        equations = torch.randn(30, len(places), generator=draw, dtype=torch.float64)
        equations -= torch.outer(equations @ weights, weights) / weights.sum()
        found = answer(function, equations, places)
        assert isinstance(found, Tensor), f"return a tensor, not {type(found).__name__}"
        hint = "Without the condition that no weight is negative the equations have many solutions."
        equal(found.tolist(), hidden.tolist(), "the chosen candidates", hint=hint)
    passed(function)


def _one(place: int, places: Tensor, draw: torch.Generator) -> Tensor:
    """A candidate of a position, drawn at random."""
    there = (places == place).nonzero()[:, 0]
    return there[torch.randint(len(there), (), generator=draw)]
