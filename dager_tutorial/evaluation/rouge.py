"""ROUGE over token ids: of one pair by rouge-score, and of all pairs of a batch at once (chapter `10_whole_attack`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from rouge_score.rouge_scorer import RougeScorer
from scipy.sparse import csr_array

Ids = tuple[int, ...]


class TokenIds:
    """Tokenizer for rouge-score that takes token ids as words, so that every token of the model counts.

    The tokenizer of rouge-score itself drops punctuation and case: texts that differ could score 1.
    """

    def tokenize(self, text: str) -> list[str]:
        """Split a text of token ids at its blanks."""
        return text.split()


ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=TokenIds())


def rouge_of(truth: Ids, recovered: Ids) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, F-measures, of one pair.

    Args:
        truth: Token ids.
        recovered: Token ids.

    Returns:
        0 to 1 by the names `rouge1`, `rouge2` and `rougeL`.

    Example:
        >>> rouge_of((1, 2, 3, 4), (1, 2, 4, 3))["rougeL"]
        0.75
    """
    words = (" ".join(map(str, ids)) for ids in (truth, recovered))
    return {name: float(rouge.fmeasure) for name, rouge in ROUGE.score(*words).items()}


def rouge_table(truths: Sequence[Ids], recovered: Sequence[Ids], n: int) -> Float[np.ndarray, "truths recovered"]:
    """ROUGE-n, F-measure, of every pair: twice the common n-grams over the n-grams of both.

    The same values as `rouge_of`, in milliseconds instead of seconds for 128 x 128 pairs.

    Args:
        truths: Token ids of each truth.
        recovered: Token ids of each sequence.
        n: Tokens of an n-gram.

    Returns:
        float64, 0 to 1.

    Example:
        >>> rouge_table([(1, 1, 2)], [(1, 1, 1), (1, 2)], 2).tolist()
        [[0.5, 0.6666666666666666]]
    """
    numbers: dict[tuple[Ids, int], int] = {}
    left, right = ([_numbered_ngrams(ids, n, numbers) for ids in side] for side in (truths, recovered))
    common = _indicators(left, len(numbers)) @ _indicators(right, len(numbers)).T
    total = np.add.outer([len(ngrams) for ngrams in left], [len(ngrams) for ngrams in right])
    return 2 * common.toarray() / np.maximum(total, 1)


def _numbered_ngrams(ids: Ids, n: int, numbers: dict[tuple[Ids, int], int]) -> list[int]:
    """A number for each n-gram; its k-th occurrence has its own, so that common bags are common sets."""
    seen: Counter[Ids] = Counter()
    numbered = []
    for ngram in (ids[start : start + n] for start in range(len(ids) - n + 1)):
        numbered.append(numbers.setdefault((ngram, seen[ngram]), len(numbers)))
        seen[ngram] += 1
    return numbered


def _indicators(numbered: Sequence[Sequence[int]], width: int) -> csr_array:
    """Sparse 0/1 matrix, sequences x n-grams."""
    starts = np.cumsum([0, *map(len, numbered)])
    columns = np.array([number for numbers in numbered for number in numbers], dtype=np.int64)
    return csr_array((np.ones(len(columns)), columns, starts), shape=(len(numbered), width))
