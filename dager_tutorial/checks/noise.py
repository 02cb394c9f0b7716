"""Checks of chapter `04_noise`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed


def _normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank_by_edge(function: Callable[[Tensor, int], int]) -> None:
    """The rank at which no singular value lies above the edge of the noise behind it.

    Args:
        function: Takes singular values (as many as inputs, falling) and the number of outputs; returns the rank.
    """
    hint = "Take sigma from the values behind the rank, anew at every step, and divide by (m - r) (d - r)."
    cases = [(0, 90, 40, 6, 1e-5), (5, 200, 60, 15, 1e-2), (5, 60, 50, 1, 1e-1), (1, 80, 30, 0, 1.0)]
    for seed, outputs, inputs, rank, sigma in cases:
        signal = _normal(outputs, rank, seed=seed) @ _normal(rank, inputs, seed=seed + 10)
        values = torch.linalg.svdvals(signal + sigma * _normal(outputs, inputs, seed=seed + 20))
        found = answer(function, values, outputs)
        equal(int(found), rank, f"the rank of {outputs} x {inputs} numbers with noise {sigma:g}", hint=hint)
    values = torch.tensor([5.0, 4.0, 3.0, 1e-9], dtype=torch.float64)
    found = answer(function, values, 30)
    equal(int(found), 3, "the rank where one value is noise", hint="Keep the last value as noise.")
    passed(function)


def output_noise(function: Callable[[Tensor, int], Tensor]) -> None:
    """The deviation of a noise entry of each output, corrected for what the fit has seen.

    Args:
        function: Takes a gradient (outputs x inputs) and its rank; returns a deviation for each output.
    """
    for seed, (outputs, inputs, rank) in enumerate([(40, 25, 4), (70, 30, 9)]):
        strong = torch.logspace(0, -2, outputs, dtype=torch.float64)[:, None]  # few outputs dominate the fit
        signal = strong * _normal(outputs, rank, seed=seed) @ _normal(rank, inputs, seed=seed + 10)
        gradient = signal + 1e-4 * _normal(outputs, inputs, seed=seed + 20)
        found = answer(function, gradient, rank)
        # Another way: the eigenvectors of the two Gram matrices.
        within = torch.linalg.eigh(gradient.T @ gradient).eigenvectors[:, -rank:]
        basis = torch.linalg.qr(gradient @ within).Q
        rest = (gradient - gradient @ within @ within.T).square().sum(1)
        expected = (rest / ((inputs - rank) * (1 - basis.square().sum(1)))).sqrt()
        hint = "The expected square of what output b leaves is sigma^2 (d - r) (1 - omega_b)."
        close(found, expected, "the noise of the outputs", tolerance=1e-3, hint=hint)
    passed(function)


def hiding_noise(function: Callable[[Tensor, Tensor, int, float, Tensor], Tensor]) -> None:
    """The noise at which z of false rows falls to a bound.

    Args:
        function: Takes singular values (inputs), directions (inputs x inputs, as columns), the rank, the bound on z and
            vectors (rows x inputs); returns a standard deviation for each vector.
    """
    for seed, rank, bound in ((0, 4, 5.0), (1, 9, 2.0)):
        gradient = _normal(40, rank, seed=seed) @ _normal(rank, 24, seed=seed + 10)
        _, values, directions = torch.linalg.svd(gradient)
        vectors = _normal(6, 24, seed=7)
        found = answer(function, values, directions.T, rank, bound, vectors)
        # Outside the span: what the pseudo-inverse does not reproduce. The leverage: the squared length of u, x = u M.
        weights = vectors @ torch.linalg.pinv(gradient, rtol=1e-9)
        outside = (vectors - weights @ gradient).norm(dim=1)
        expected = outside / (bound * weights.norm(dim=1) * (24 - rank) ** 0.5)
        hint = "sigma = residual / (bound * sqrt((d - r) * leverage)), the leverage over the first r directions only."
        close(found, expected, "the noise", hint=hint)
    passed(function)
