"""Checks of chapter 7, when it breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed


def texts_that_fit(function: Callable[[Sequence[Sequence[int]], int], int]) -> None:
    """Exercise 7.1: how many of the first texts leave room in the span of block 1.

    Args:
        function: Takes token ids, a list for each text, and the model's width; returns a number of texts.
    """
    apart = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    shared = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [1, 2, 3, 6, 7]]
    cases = [
        (apart, 100, 3, "All texts may fit."),
        (apart, 7, 2, "Five prefixes fit into seven dimensions: at most d - 2."),
        (apart, 6, 1, "Five prefixes are more than 6 - 2."),
        (apart, 4, 0, "Not even the first text may fit."),
        (shared, 9, 4, "Beginnings that texts share count once."),
        (shared, 8, 3, "A text that begins another adds no prefix."),
    ]
    for ids, width, expected, hint in cases:
        equal(int(answer(function, ids, width)), expected, f"texts that fit into width {width}", hint=hint)
    passed(function)


def leverage(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 7.2: the squared length of the shortest combination of a gradient's rows that gives a vector.

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


def status(function: Callable[[int, int, int, int | None], str]) -> None:
    """Exercise 7.3: the status of an attack that did not saturate.

    Args:
        function: Takes the rank of block 0, the number of candidates, the number of confirmed prefixes and of promised
            ones (None where noise hides it); returns the status.
    """
    cases = [
        ((40, 60, 55, 55), "exact", "All promised prefixes were confirmed."),
        ((40, 60, 50, 55), "partial", "Prefixes are missing."),
        ((40, 60, 57, 55), "partial", "More pass than there can be: some are too alike to be told apart."),
        ((40, 60, 55, None), "partial", "Without a promised number nobody knows whether these are all."),
        ((0, 0, 0, None), "no_signal", "A rank of zero comes first: there is nothing to test against."),
        ((40, 0, 0, 55), "no_candidates", "No token passed."),
        ((40, 60, 0, 55), "no_candidates", "Tokens passed, but none begins a text."),
        ((40, 60, 0, None), "no_candidates", "Tokens passed, but none begins a text."),
    ]
    for counts, expected, hint in cases:
        equal(answer(function, *counts), expected, f"the status for {counts}", hint=hint)
    passed(function)
