"""Checks of chapter `14_defences`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.stats import norm
from torch import Tensor

from dager_tutorial.checks.common import answer, equal, passed

__all__ = ["best_candidate", "dropout_rate", "epsilon_spent"]


def best_candidate(function: Callable[[Tensor, Tensor], int]) -> None:
    """The candidate that explains what was received under even Gaussian noise.

    Args:
        function: Takes gradients (candidates x numbers) and what was received (numbers); returns the index of the
            likeliest candidate, a whole number.
    """
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 50, generator=draw)
    gradients[2] *= 4  # a long one, which attracts whoever compares products alone
    for true in range(len(gradients)):
        received = gradients[true] + 0.3 * torch.randn(50, generator=draw)
        found = int(answer(function, gradients, received))
        hint = "Compare what each candidate leaves: long gradients have large products with anything."
        equal(found, true, f"the candidate behind update {true}", hint=hint)
    half = torch.stack([gradients[0], 0.5 * gradients[0]])
    found = int(answer(function, half, 0.5 * gradients[0]))
    equal(
        found, 1, "the candidate of half the length", hint="The size of a gradient is known, too: do not divide it out."
    )
    passed(function)


def epsilon_spent(function: Callable[[float, float, int], float]) -> None:
    """What releases with Gaussian noise spend.

    Args:
        function: Takes the noise multiplier, delta and the number of releases; returns the smallest epsilon.
    """
    for multiplier, delta, releases in ((1.0, 1e-5, 1), (4.8448, 1e-5, 1), (0.0969, 1e-5, 1), (4.8448, 1e-5, 100)):
        expected, root = _epsilon(multiplier, delta, releases), math.sqrt(releases)
        found = float(answer(function, multiplier, delta, releases))
        what = f"epsilon of {releases} releases with multiplier {multiplier:g}"
        hint = f"{releases} releases are one whose noise is {root:g} times smaller." if releases > 1 else ""
        assert abs(found - expected) <= 1e-3 * expected, (
            f"{what} is {found:.4g}, should be {expected:.4g}. {hint}".strip()
        )
    passed(function)


def _epsilon(multiplier: float, delta: float, releases: int) -> float:
    """By bisection in the exact formula."""
    signal = math.sqrt(releases) / multiplier
    low, high = 0.0, signal * signal + 20 * signal
    for _ in range(200):
        middle = (low + high) / 2
        left, right = signal / 2 - middle / signal, -signal / 2 - middle / signal
        broken = norm.cdf(left) - math.exp(middle + float(norm.logcdf(right)))
        low, high = (middle, high) if broken > delta else (low, middle)
    return high


def dropout_rate(function: Callable[[Tensor], float]) -> None:
    """The rate of dropout behind the embeddings, from the zeros of their gradient.

    Args:
        function: Takes the token embedding's gradient (tokens x width); returns the probability of an entry to be
            dropped.
    """
    draw = torch.Generator().manual_seed(1)
    for rate in (0.1, 0.3):
        gradient = torch.zeros(40, 5000)
        for token, times in ((3, 1), (8, 2), (11, 1), (30, 3)):
            for _ in range(times):
                mask = torch.rand(5000, generator=draw) >= rate
                gradient[token] += torch.randn(5000, generator=draw) * mask
        found = float(answer(function, gradient))
        hint = "Tokens that no text used are zero everywhere; tokens that stand twice are zero where both masks are."
        assert abs(found - rate) < 0.03, f"the rate is {found:.3f}, should be near {rate}. {hint}"
    passed(function)
