"""Checks of chapter `11_limits`, when it breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Counts(NamedTuple):
    """What the attack on a causal model has counted when it ends.

    Attributes:
        rank: Rank of block 0; None where its gradient is missing or zero.
        prefixes: Different prefixes that were confirmed.
        promised: Different prefixes that a clear rank counts; None where noise hides it.
        texts: Texts that are reported.
        ends: Those of them that end where the last block has a row; None where it shows no ends.
        promised_ends: Ends that a clear rank of the last block counts; None where noise hides it.
    """

    rank: int | None = 40
    prefixes: int = 55
    promised: int | None = 55
    texts: int = 4
    ends: int | None = 4
    promised_ends: int | None = 4


STATUSES = (
    (Counts(), "texts_complete", "All promised prefixes were confirmed, and every text to its end."),
    (Counts(ends=None, promised_ends=None), "rows_complete", "Every row is explained, and nothing shows the ends."),
    (Counts(promised_ends=None), "rows_complete", "Noise hides how many ends there are: one may be missing."),
    (Counts(promised_ends=5), "rows_complete", "Every row is explained; one end more is promised than was found."),
    (Counts(ends=3), "partial", "A text ends where the last block has no row."),
    (Counts(prefixes=50), "partial", "Prefixes are missing."),
    (Counts(prefixes=57), "partial", "More pass than there can be: some are too alike to be told apart."),
    (Counts(promised=None), "ends_confirmed", "The prefixes cannot be counted, but the ends can."),
    (Counts(promised=None, ends=3), "partial", "One of the texts is not confirmed to its end."),
    (Counts(promised=None, promised_ends=5), "partial", "The last block has one end more than was confirmed."),
    (Counts(promised=None, promised_ends=None), "partial", "Without any promised number nobody knows what is missing."),
    (Counts(promised=None, ends=None, promised_ends=None), "partial", "Nothing can be counted here."),
    (Counts(rank=None, prefixes=0, texts=0, ends=None), "no_signal", "Nothing was shared that could be tested."),
    (Counts(rank=0, prefixes=0, texts=0, ends=None), "noise", "A rank of 0: nothing stands out from noise."),
    (Counts(prefixes=0, texts=0, ends=None), "wrong_model", "There is a span, and no text lies in it."),
    (Counts(prefixes=0, promised=None, texts=0, ends=None), "wrong_model", "There is a span, and no text lies in it."),
)
"""Counts, the status that belongs to them, and what to think of where an answer differs (exercise 7.3)."""


def status(function: Callable[[Counts], str]) -> None:
    """Exercise 7.3: the status of an attack that ended in time and did not saturate.

    Args:
        function: Takes `Counts`; returns the status.
    """
    for counts, expected, hint in STATUSES:
        equal(answer(function, counts), expected, f"the status for {counts}", hint=hint)
    passed(function)
