"""Checks of chapter `05_token_filter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dager_tutorial.checks.common import answer, close, equal, passed

Pair = tuple[int, int]


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was computed."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def pair_squares(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise "squares of all pairs": squared lengths of all sums of a token and a position part.

    Args:
        function: Takes token parts (tokens x directions) and position parts (positions x directions); returns squared
            lengths (tokens x positions).
    """
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        tokens, positions = torch.randn(40, 30, generator=draw), torch.randn(9, 30, generator=draw)
        tokens[:9] = -positions  # true pairs: the parts cancel
        with _Largest() as seen:
            found = answer(function, tokens, positions)
        hint = "The square of a sum has a mixed term, twice the product. Is there a root too much?"
        close(found, (tokens[:, None] + positions).square().sum(2), "the squares", hint=hint)
        most = max(tokens.numel(), 40 * 9)
        assert seen.numbers <= most, f"a tensor of {seen.numbers} numbers is built: {most} are enough"
    passed(function)


def passing_pairs(function: Callable[[set[Pair]], Iterable[Pair]]) -> None:
    """Exercise "what passes": every pair that passes the filter, from the pairs of the batch.

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
