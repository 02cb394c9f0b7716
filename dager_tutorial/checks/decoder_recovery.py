"""Checks of chapter `06_decoder_recovery`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

Prefix = tuple[int, ...]
Test = Callable[[Sequence[Prefix]], list[bool]]


def prefixes(texts: Iterable[Prefix]) -> set[Prefix]:
    """All beginnings of texts, the texts themselves included.

    >>> sorted(prefixes([(3, 5)]))
    [(3,), (3, 5)]
    """
    return {text[: end + 1] for text in texts for end in range(len(text))}


def grow(function: Callable[[list[int], Test, int], Iterable[Prefix]]) -> None:
    """Exercise "grow a tree": all confirmed prefixes, grown from the left.

    Args:
        function: Takes token ids, a test (a list of prefixes to a list of booleans) and the longest length; returns
            the confirmed prefixes.
    """
    cases: list[tuple[list[Prefix], int, str]] = [
        ([(1, 2, 3), (1, 4)], 9, "Begin with the empty prefix."),
        ([(5,), (2, 2, 5, 1)], 9, "A text of one token ends early and must stay in the answer."),
        ([(1, 1, 1, 1, 1, 1)], 3, "Stop at the longest length."),
    ]
    for texts, longest, hint in cases:
        true = prefixes(texts)
        asked: list[Prefix] = []

        def is_confirmed(
            candidates: Sequence[Prefix], true: set[Prefix] = true, log: list[Prefix] = asked
        ) -> list[bool]:
            log.extend(candidates)
            return [candidate in true for candidate in candidates]

        found = sorted(tuple(prefix) for prefix in answer(function, [1, 2, 3, 4, 5], is_confirmed, longest))
        equal(found, sorted(prefix for prefix in true if len(prefix) <= longest), "the prefixes", hint=hint)
        for prefix in asked:
            assert len(prefix) == 1 or prefix[:-1] in true, f"{prefix} was tested, but {prefix[:-1]} is not confirmed"
            assert len(prefix) <= longest, f"{prefix} was tested, which is longer than {longest}"
    passed(function)


def next_output(function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise "one more token": attention of one more token over a cache.

    Args:
        function: Takes the prefix's keys and values (length x width) and the token's query, key and value (width);
            returns its attention output (width).
    """
    for seed, length in enumerate((4, 1, 0)):
        draw = torch.Generator().manual_seed(seed)
        queries, keys, values = (torch.randn(length + 1, 8, generator=draw) for _ in range(3))
        whole = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        found = answer(function, keys[:-1], values[:-1], queries[-1], keys[-1], values[-1])
        hint = "Scale, softmax, and the token's own key." if length else "An empty prefix leaves its own value."
        close(found, whole[-1], "the output", hint=hint)
    passed(function)


def whole(function: Callable[[set[Prefix], set[Prefix]], Iterable[Prefix]]) -> None:
    """Exercise "whole texts": the texts among confirmed prefixes.

    Args:
        function: Takes the confirmed prefixes and those that pass in the last block; returns the texts.
    """
    texts: set[Prefix] = {(1, 2, 3, 4), (1, 2), (7,), (7, 8)}
    confirmed = prefixes(texts)
    cases: list[tuple[set[Prefix], set[Prefix], str]] = [
        (texts, texts, "A text may begin another one: the last block knows it."),
        ({(7, 8)}, {(7, 8)}, "What does not pass in the last block is no end, be it a leaf or not."),
        (confirmed, {(1, 2, 3, 4), (7, 8)}, "Where every prefix passes, only the leaves can be named."),
    ]
    for passing, expected, hint in cases:
        found = {tuple(text) for text in answer(function, set(confirmed), set(passing))}
        equal(sorted(found), sorted(expected), "the texts", hint=hint)
    passed(function)


def different_rows(function: Callable[[set[Prefix], int | None], int]) -> None:
    """Exercise "count rows": how many different rows of block 1 the prefixes of a rotary model have.

    Args:
        function: Takes prefixes and the number of tokens that block 0 attends to, the own one included (None: all);
            returns the number of different rows.
    """
    long, other = (1, 2, 3, 4, 5), (9, 2, 3, 4, 5)
    cases: list[tuple[set[Prefix], int | None, int, str]] = [
        (prefixes([long, (1, 2, 7)]), None, 6, "A prefix that two texts share is one row."),
        (prefixes([(7, 7, 7, 8)]), None, 2, "Copies of a first token are one row with the token alone."),
        (prefixes([(8, 7, 7, 7)]), None, 4, "A run inside a text averages other values as well: no chain."),
        (prefixes([long, other]), None, 10, "Without a window everything before a token counts."),
        (prefixes([long, other]), 3, 8, "Of prefixes beyond the window only the last tokens count."),
        (prefixes([(8, 7, 7, 7, 7, 7, 6)]), 3, 5, "A run as long as the window is one row with the token alone."),
        ({(7,), (8, 7, 7, 7)}, 3, 1, "Where all that is seen is copies of one token, how many does not matter."),
        ({(2, 3, 4), (1, 2, 3, 4)}, 3, 1, "A short prefix may see what a long one sees."),
    ]
    for given, window, expected, hint in cases:
        what = f"the rows of {sorted(given)} with window {window}"
        equal(int(answer(function, set(given), window)), expected, what, hint=hint)
    passed(function)
