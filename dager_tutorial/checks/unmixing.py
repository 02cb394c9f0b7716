"""Checks of chapter `07_unmixing`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, passed


def _normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginals(function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Exercise "the marginals": those of tokens and of positions, from a gradient.

    Args:
        function: Takes a gradient (width x outputs), token vectors (tokens x width) and position vectors (positions x
            width); returns the marginals of tokens (tokens x outputs) and of positions (positions x outputs).
    """
    for seed, (tokens, positions) in enumerate(((1, 1), (4, 3), (12, 9))):
        vectors = _normal(tokens + positions, 24, seed=seed) + 0.3  # not orthogonal to each other
        e, p = vectors.split([tokens, positions])
        rows = _normal(tokens, positions, 31, seed=seed + 10)
        of_tokens, of_positions = rows.sum(1), rows.sum(0)
        found = answer(function, e.T @ of_tokens + p.T @ of_positions, e, p)
        assert isinstance(found, tuple) and len(found) == 2, "return two things: A, and B"
        hint = "Solve for tokens and positions together, not one after the other."
        close(found[0], of_tokens, "A", hint=hint)
        close(found[1], of_positions, "B", hint=hint)
    passed(function)


def auc(function: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise "the AUC": the chance that a true score lies above a false one.

    Args:
        function: Takes scores (float64) and which of them are true (bool); returns a number.
    """
    scores = torch.tensor([0.9, 0.5, 0.4, 0.2, 0.1], dtype=torch.float64)
    cases = [([1, 0, 1, 0, 0], 5 / 6), ([1, 1, 0, 0, 0], 1.0), ([0, 0, 0, 1, 1], 0.0), ([0, 1, 1, 1, 0], 1 / 2)]
    for right, expected in cases:
        found = answer(function, scores, torch.tensor(right).bool())
        what = f"the AUC of {scores.tolist()}, true where {right}"
        hint = "Divide by the number of ways to draw one true and one false score."
        close(torch.as_tensor(found, dtype=torch.float64).reshape(()), _number(expected), what, hint=hint)
    passed(function)


def _number(value: float) -> Tensor:
    # An AUC of zero is compared with zero: a relative error needs a scale.
    return torch.tensor(value, dtype=torch.float64)


def unexplained(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise "is this its text?": the share of a query gradient that the keys of a text leave over.

    Args:
        function: Takes the gradient of a query (width, float64) and keys (tokens x width, float64); returns the share,
            a number.
    """
    for seed in range(3):
        keys = _normal(6, 16, seed=seed)
        coefficients = _normal(6, seed=seed + 10)
        coefficients -= coefficients.mean()
        own = _share(function, coefficients @ keys, keys)
        assert own < 1e-6, f"{own:.2g} of a row is left over by the keys of its own text, should be rounding"
        stray = _share(function, keys[0], keys)
        hint = "only coefficients that add up to zero are allowed"
        assert stray > 1e-3, f"a single key is explained (left over: {stray:.2g}): {hint}"
        row = _normal(16, seed=seed + 20)
        found = torch.tensor(_share(function, row, keys), dtype=torch.float64)
        close(found, _left(row, keys), "the share of a row of no text", hint="Is it the length, not its square?")
        long = _share(function, row, _normal(17, 16, seed=seed))
        assert long < 1e-6, f"17 keys leave {long:.2g} of a row of width 16, should be rounding"
    passed(function)


def _share(function: Callable[[Tensor, Tensor], Tensor], row: Tensor, keys: Tensor) -> float:
    return float(torch.as_tensor(answer(function, row, keys)))


def _left(row: Tensor, keys: Tensor) -> Tensor:
    """The same share, by an orthonormal basis."""
    basis = torch.linalg.qr((keys[1:] - keys[0]).T).Q
    return (row - basis @ (basis.T @ row)).norm() / row.norm()
