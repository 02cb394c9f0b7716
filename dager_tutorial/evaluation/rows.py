"""How many different rows a batch gives: what the rank of a deeper tap tells, and what an attack has to find."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct_prefixes(sequences: Iterable[Sequence[int]]) -> int:
    """Number of different beginnings of token sequences, themselves included.

    Args:
        sequences: Token ids of each text.

    Example:
        >>> distinct_prefixes([[1, 2, 3], [1, 2], [1, 4]])
        4
    """
    return len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


def distinct_rows(sequences: Iterable[Sequence[int]], *, causal: bool) -> int:
    """Number of different rows that token sequences give: one a beginning, or one a token of each different text.

    Args:
        sequences: Token ids of each text.
        causal: Whether the model is causal, so that a beginning gives the same rows in every text.

    Example:
        >>> texts = [[1, 2, 3], [1, 4], [1, 4]]
        >>> distinct_rows(texts, causal=True), distinct_rows(texts, causal=False)
        (4, 5)
    """
    if causal:
        return distinct_prefixes(sequences)
    return sum(map(len, set(map(tuple, sequences))))
