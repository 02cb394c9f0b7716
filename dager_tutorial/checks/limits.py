"""Checks of chapter `11_limits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed
from dager_tutorial.checks.whole_attack import STATUSES, Counts

__all__ = ["STATUSES", "Counts", "leverage", "texts_for_factor", "texts_that_fit"]

Texts = Sequence[Sequence[int]]

APART = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
SHARED = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [1, 2, 3, 6, 7]]


def texts_that_fit(function: Callable[[Texts, int], int]) -> None:
    """How many of the first texts leave room in the span of block 1.

    Args:
        function: Takes token ids, a list for each text, and the model's width; returns a number of texts.
    """
    cases = [
        (APART, 100, 3, "All texts may fit."),
        (APART, 7, 2, "Five prefixes fit into seven dimensions: at most d - 2."),
        (APART, 6, 1, "Five prefixes are more than 6 - 2."),
        (APART, 4, 0, "Not even the first text may fit."),
        (SHARED, 9, 4, "Beginnings that texts share count once."),
        (SHARED, 8, 3, "A text that begins another adds no prefix."),
    ]
    for ids, width, expected, hint in cases:
        equal(int(answer(function, ids, width)), expected, f"texts that fit into width {width}", hint=hint)
    passed(function)


def leverage(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The squared length of the shortest combination of a gradient's rows that gives a vector.

    Args:
        function: Takes a gradient (outputs x inputs) of full rank and vectors (rows x inputs); returns the
            leverages (rows).
    """
    for seed, outputs, inputs in ((0, 30, 12), (1, 64, 5)):
        draw = torch.Generator().manual_seed(seed)
        gradient = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
        gradient *= torch.logspace(0, -2, inputs, dtype=torch.float64)
        vectors = 3 * torch.randn(4, inputs, generator=draw, dtype=torch.float64)
        _, values, directions = torch.linalg.svd(gradient, full_matrices=False)
        expected = (vectors @ directions.T / values).square().sum(1)
        hint = "Do not scale the vectors, and square the length of u."
        close(answer(function, gradient, vectors), expected, "the leverage", hint=hint)
    passed(function)


def texts_for_factor(function: Callable[[Texts, int, float], int | None]) -> None:
    """How many of the first texts bring `n / (n - d)` down to a factor.

    Args:
        function: Takes token ids, a list for each text, the width, and a factor; returns a number of texts, or None
            where all of them are too few.
    """
    cases = [
        (APART, 4, 9.0, 2, "Three prefixes in four dimensions leave a factor of infinity, five one of 5."),
        (APART, 4, 5.0, 2, "5 / (5 - 4) is 5: at most the factor is enough."),
        (APART, 4, 4.0, 3, "Nine prefixes: 9 / (9 - 4) is 1.8."),
        (APART, 3, 99.0, 2, "As many prefixes as dimensions are not enough: the factor is infinite."),
        (SHARED, 3, 3.0, 2, "Beginnings that texts share count once: after two texts there are 5."),
        (SHARED, 4, 3.0, 4, "A text that begins another adds no prefix: 7 / (7 - 4) after the fourth."),
    ]
    for ids, width, factor, expected, hint in cases:
        found = answer(function, ids, width, factor)
        equal(int(found), expected, f"texts for a factor of {factor:g} at width {width}", hint=hint)
    few = function(APART, 20, 2.0)
    assert few is None, f"for a batch below the line: {few!r}, should be None. No factor is reached up to n = d."
    passed(function)
