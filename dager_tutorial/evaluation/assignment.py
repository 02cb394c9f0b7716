"""Which recovered sequence stands for which true text: an optimal assignment, for every architecture alike."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from dager_tutorial.evaluation.rouge import Ids, rouge_table


def assign(
    truths: Sequence[Ids], counts: Sequence[int], recovered: Sequence[Ids], frame: AbstractSet[int]
) -> list[int | None]:
    """Give each truth a recovered sequence of its own, so that ROUGE-1 + ROUGE-2 + exact of the batch is largest.

    Args:
        truths: Distinct token sequences.
        counts: How many texts of the batch each of them stands for.
        recovered: Token sequences, sorted: their order decides between equally good assignments.
        frame: Ids of tokens that do not count for ROUGE.

    Returns:
        For each truth the index of its sequence; None where none is left that shares a token.

    Example:
        >>> assign([(5, 6), (5, 7)], [1, 1], [(5, 7), (8,)], frozenset())
        [None, 0]
    """
    gain = _gain(truths, recovered, frame) * np.array([[count] for count in counts])
    related = np.flatnonzero(gain.any(axis=0))  # others must not even decide between equally good assignments
    columns: list[int | None] = [None] * len(truths)
    for row, column in zip(*linear_sum_assignment(gain[:, related], maximize=True), strict=True):
        if gain[row, related[column]] > 0:
            columns[row] = int(related[column])
    return columns


def without_frame(ids: Ids, frame: AbstractSet[int]) -> Ids:
    """The tokens of a sequence that are its content.

    Args:
        ids: Token ids.
        frame: Ids of the tokens that frame or pad a text.

    Example:
        >>> without_frame((101, 7, 8, 102), {101, 102})
        (7, 8)
    """
    return tuple(token for token in ids if token not in frame)


def _gain(
    truths: Sequence[Ids], recovered: Sequence[Ids], frame: AbstractSet[int]
) -> Float[np.ndarray, "truths recovered"]:
    """ROUGE-1 + ROUGE-2 + exact of every pair, 0 to 3; of a truth of one token, exact counts for ROUGE-2."""
    rows, columns = ([without_frame(ids, frame) for ids in sequences] for sequences in (truths, recovered))
    exact = np.array([truth == ids for truth in truths for ids in recovered], float)
    exact = exact.reshape(len(truths), len(recovered))
    one_token = np.array([[len(ids) == 1] for ids in rows])
    return rouge_table(rows, columns, 1) + np.where(one_token, exact, rouge_table(rows, columns, 2)) + exact
