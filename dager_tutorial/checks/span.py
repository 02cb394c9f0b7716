"""Checks of chapter `04_noise`, low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed


def _mixed(seed: int, rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Input rows, and a gradient (outputs x inputs) that mixes them, float64."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
    return vectors, torch.randn(outputs, rows, generator=draw, dtype=torch.float64) @ vectors


def relative_distance(function: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 2.1: how far vectors lie from the row space of a gradient, relative to their lengths.

    Args:
        function: Takes a gradient (outputs x inputs), vectors (rows x inputs) and the gradient's rank; returns the
            distances (rows).
    """
    for seed, outputs in ((0, 30), (1, 8)):
        inputs, gradient = _mixed(seed, 5, outputs, 12)
        strangers = 100 * torch.randn(3, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        found = answer(function, gradient, torch.cat([inputs, strangers]), 5)
        # An oracle of another kind: the least-squares fit of a vector by the inputs.
        fit = torch.linalg.lstsq(inputs.T, strangers.T, driver="gelsd").solution
        expected = (strangers - (inputs.T @ fit).T).norm(dim=1) / strangers.norm(dim=1)
        hint = "Divide by the length of each vector: the strangers are a hundred times as long as the inputs."
        close(found, torch.cat([torch.zeros(5, dtype=torch.float64), expected]), "the distance", hint=hint)
    passed(function)


def rotary_ranks(function: Callable[[Sequence[Sequence[int]]], tuple[int, int]]) -> None:
    """Exercise 2.2: the ranks of blocks 0 and 1 of a causal rotary model whose tokenizer adds nothing.

    Args:
        function: Takes token ids, a list for each text; returns the two ranks.
    """
    hints = {
        "plain": "Count different tokens, then different prefixes.",
        "shared": "Equal prefixes of two texts are one row.",
        "repeated": "A first token repeated, [4], [4, 4], [4, 4, 4], is one row in block 1.",
    }
    batches = [
        ([[3, 5, 7], [8, 9]], (5, 5), "plain"),
        ([[3, 5, 7], [3, 5], [3, 6, 5], [3, 5, 7]], (4, 5), "shared"),
        ([[4, 4, 4, 6], [4, 4], [6, 6]], (2, 3), "repeated"),
        ([[4, 6, 6, 6], [2, 4, 4]], (3, 7), "plain"),
    ]
    for ids, expected, kind in batches:
        found = answer(function, ids)
        assert isinstance(found, tuple) and len(found) == 2, "return two numbers: the ranks of blocks 0 and 1"
        equal((int(found[0]), int(found[1])), expected, f"the ranks for {ids}", hint=hints[kind])
    passed(function)


def hiding_noise(function: Callable[[Tensor, Tensor, int, float, Tensor], Tensor]) -> None:
    """Exercise 2.3: the noise at which z of false rows falls to a bound.

    Args:
        function: Takes singular values (inputs), directions (inputs x inputs, as columns), the rank, the bound on z and
            vectors (rows x inputs); returns a standard deviation for each vector.
    """
    for seed, rank, bound in ((0, 4, 5.0), (1, 9, 2.0)):
        _, gradient = _mixed(seed, rank, 40, 24)
        _, values, directions = torch.linalg.svd(gradient)
        vectors = torch.randn(6, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        found = answer(function, values, directions.T, rank, bound, vectors)
        # Outside the span: what the pseudo-inverse does not reproduce. The leverage: the squared length of u, x = u M.
        weights = vectors @ torch.linalg.pinv(gradient, rtol=1e-9)
        outside = (vectors - weights @ gradient).norm(dim=1)
        expected = outside / (bound * weights.norm(dim=1) * (24 - rank) ** 0.5)
        hint = "sigma = residual / (bound * sqrt((d - r) * leverage)), the leverage over the first r directions only."
        close(found, expected, "the noise", hint=hint)
    passed(function)
