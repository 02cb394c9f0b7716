"""Checks of chapter `05_token_filter`, token filter."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

Pair = tuple[int, int]


def lengths_of_all_pairs(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.1: lengths of the projections of all token-position pairs, from their parts.

    Args:
        function: Takes token parts (tokens x directions), position parts (positions x directions) and deviations
            (tokens x positions); returns the lengths (tokens x positions).
    """
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        tokens, positions = torch.randn(40, 9, generator=draw), torch.randn(7, 9, generator=draw)
        tokens[:7] = -positions  # true pairs: the parts cancel, and rounding may leave a square below zero
        deviation = torch.rand(40, 7, generator=draw) + 0.5
        expected = (tokens[:, None] + positions).norm(dim=2) / deviation
        found = answer(function, tokens, positions, deviation)
        if isinstance(found, Tensor):
            assert not found.isnan().any(), "the lengths are not a number where the parts cancel: see the hint"
        close(found, expected, "the lengths", tolerance=1e-3, hint="Divide by the deviation once, not by its square.")
    passed(function)


def passing_pairs(function: Callable[[set[Pair]], Iterable[Pair]]) -> None:
    """Exercise 3.2: every pair that passes the filter, from the pairs of the batch.

    Args:
        function: Takes a set of (token, position); returns the pairs that pass.
    """
    ladder = {(step + shift, step) for step in range(6) for shift in (0, 1)}  # one long path: 7 tokens, 6 positions
    batches: list[tuple[set[Pair], int, str]] = [
        ({(5, 0)}, 1, "One pair is all there is."),
        ({(5, 0), (8, 0), (8, 1)}, 4, "Token 5 at position 1 is the fourth corner of a square."),
        ({(5, 0), (8, 1)}, 2, "Nothing joins these two: only pairs of one component pass."),
        (ladder, 42, "New pairs make new squares: one round is not enough."),
        (ladder | {(90, 40), (91, 40), (91, 41), (7, 60)}, 47, "Every component passes for itself."),
    ]
    for pairs, count, hint in batches:
        found = {(int(token), int(position)) for token, position in answer(function, set(pairs))}
        assert pairs <= found, "a pair of the batch is missing: a true pair always passes"
        equal(len(found), count, f"how many pairs pass for {sorted(pairs)}", hint=hint)
        tokens, positions = {token for token, _ in pairs}, {position for _, position in pairs}
        assert {token for token, _ in found} == tokens, "a token passes that is not in the batch"
        assert {position for _, position in found} == positions, "a position passes that is not in the batch"
    passed(function)


def marginals(function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Exercise 3.3: the marginals of tokens and positions, from a gradient.

    Args:
        function: Takes a gradient (width x outputs), token vectors (tokens x width) and position vectors (positions x
            width); returns the marginals of tokens (tokens x outputs) and of positions (positions x outputs).
    """
    for seed, (tokens, positions) in enumerate(((1, 1), (4, 3), (12, 9))):
        draw = torch.Generator().manual_seed(seed)
        e = torch.randn(tokens, 24, generator=draw, dtype=torch.float64) + 0.3  # not orthogonal to each other
        p = torch.randn(positions, 24, generator=draw, dtype=torch.float64) + 0.3
        rows = torch.randn(tokens, positions, 31, generator=draw, dtype=torch.float64)
        of_tokens, of_positions = rows.sum(1), rows.sum(0)
        found = answer(function, e.T @ of_tokens + p.T @ of_positions, e, p)
        assert isinstance(found, tuple) and len(found) == 2, "return two things: A, and B"
        hint = "Solve for tokens and positions together, not one after the other."
        close(found[0], of_tokens, "A", hint=hint)
        close(found[1], of_positions, "B", hint=hint)
    passed(function)
