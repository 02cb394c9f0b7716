"""Checks of chapter `08_encoder_recovery`, encoder recovery."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed


def score_gradient(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 5.1: what comes back to the scores of one query.

    Args:
        function: Takes attention weights (tokens), values (tokens x width) and the gradient of the output (width);
            returns the gradient of the scores (tokens).
    """
    for seed, tokens in enumerate((1, 2, 7)):
        draw = torch.Generator().manual_seed(seed)
        scores, values, upstream = (torch.randn(*shape, generator=draw) for shape in ((tokens,), (tokens, 5), (5,)))
        scores.requires_grad_()
        attention = scores.softmax(0)
        (attention @ values @ upstream).backward()
        expected = scores.grad
        assert expected is not None
        found = answer(function, attention.detach(), values, upstream)
        if tokens == 1:
            hint = "A softmax over one score is constant: its gradient is 0."
            assert isinstance(found, Tensor) and float(found.abs().max()) < 1e-6, f"one token: {hint}"
            continue
        close(found, expected, "the gradient of the scores", hint="It adds up to 0 over the tokens.")
    passed(function)


def unexplained(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 5.2: the share of a query gradient that the keys of a text cannot explain.

    Args:
        function: Takes a query gradient (width) and keys (tokens x width), both float64; returns the share, a number.
    """
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        keys = torch.randn(6, 16, generator=draw, dtype=torch.float64) + 1.0
        coefficients = torch.randn(6, generator=draw, dtype=torch.float64)
        own = (coefficients - coefficients.mean()) @ keys
        assert float(_number(function, own, keys)) < 1e-6, "a query gradient of this text should leave nothing over"
        basis = torch.linalg.qr((keys[1:] - keys[0]).T).Q
        for row in (keys[0], torch.randn(16, generator=draw, dtype=torch.float64)):
            expected = (row - basis @ (basis.T @ row)).norm() / row.norm()
            hint = "Use differences of keys: the coefficients add up to 0."
            close(_number(function, row, keys), expected, "the share of another row", hint=hint)
            close(_number(function, 5 * row, keys), expected, "the share of a longer row", hint="Divide by its length.")
        many = torch.randn(30, 16, generator=draw, dtype=torch.float64)
        share = float(_number(function, keys[0], many))
        assert share < 1e-6, f"30 keys fill a head of width 16: the share should be 0, not {share:.2f}"
    passed(function)


def _number(function: Callable[[Tensor, Tensor], Tensor], row: Tensor, keys: Tensor) -> Tensor:
    return torch.as_tensor(answer(function, row, keys), dtype=torch.float64).reshape(())


def choose(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 5.3: one candidate for each place, from linear equations of their weights.

    Args:
        function: Takes equations (equations x candidates, float64) and the place of each candidate (int64,
            candidates); returns the index of each place's chosen candidate (int64, places).
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
    """A candidate of a place, drawn at random."""
    there = (places == place).nonzero()[:, 0]
    return there[torch.randint(len(there), (), generator=draw)]
