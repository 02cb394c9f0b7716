"""How much of a batch came back: one matching rule and the measures that follow from it.

This is the one place where a reconstruction meets the truth. Recovered sequences come in no order, so
an optimal assignment pairs them with the true texts, by the same rule for every architecture.
The DAGER paper (arXiv 2405.15586) reports ROUGE-1 and ROUGE-2; the fraction of exact texts is stricter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from dager_tutorial.client.step import TASKS, encode, masked_inputs
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel, frame_ids
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.errors import quote

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """How much of a batch was recovered: fractions from 0 to 1, means over its texts unless said otherwise.

    Attributes:
        rouge1: ROUGE-1, F-measure over token ids, special tokens left out.
        rouge2: ROUGE-2, F-measure over neighbouring token ids, special tokens left out. rouge-score gives
            0 to a text of one token, which has no neighbours; here it is 1 when recovered exactly, else 0.
        rougeL: ROUGE-L, F-measure of the longest common subsequence, special tokens left out.
        exact: Fraction of texts recovered exactly, token by token, special tokens included.
        token_accuracy: Fraction of all true tokens of the batch, special tokens left out, that stand at the
            same position of the assigned sequence.
        batch_size: Number of texts.
        n_tokens: Number of tokens that the client trained on, special tokens included, pads never.
        hidden_size: Width of the model's hidden states.
        pairs: For each text in order, the text and what was recovered of it, "" where nothing was.
    """

    rouge1: float
    rouge2: float
    rougeL: float
    exact: float
    token_accuracy: float
    batch_size: int
    n_tokens: int
    hidden_size: int
    pairs: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, float | int]:
        """The numbers, without the texts."""
        return {name: value for name, value in vars(self).items() if name != "pairs"}


class TokenIds:
    """Tokenizer for rouge-score that takes token ids as words, so that every token of the model counts.

    The tokenizer of rouge-score itself drops punctuation and case: texts that differ could score 1.
    """

    def tokenize(self, text: str) -> list[str]:
        """Split a text of token ids at its blanks."""
        return text.split()


ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=TokenIds())


def score(
    reconstruction: Reconstruction,
    texts: Sequence[str],
    model: LanguageModel,
    *,
    task: str = "classification",
    max_length: int | None = None,
    seed: int = 0,
) -> Score:
    """Compare a reconstruction with the true batch.

    The truth is what the client's network saw (`client.encode`). With the next-token loss the last token of
    a text is only a target and no input: the truth is then all but each last token, and a text
    of which no token is left (special tokens aside) is left out of the averages. In masked-language training
    the tokens behind the masks are only targets: the truth is the corrupted text (`client.masked_inputs`), in
    which a mask is a token like others. Texts with the same truth give the same rows, which come back once:
    they are recovered by one sequence, and each of them counts.

    Recovered sequences are assigned to the distinct truths, each used once, so that the sum over the
    batch of ROUGE-1 + ROUGE-2 + exact is largest. Neither the order of the texts nor that of the
    reconstruction matters. Sequences that are assigned to no text cost nothing.

    Args:
        reconstruction: What the server found.
        texts: The batch.
        model: The model that both sides share.
        task: `classification`, `next_token` or `masked`, as the client trained.
        max_length: Truncation of the texts in tokens, as the client's.
        seed: The client's seed, which chose the masks; of no use to the other tasks.

    Returns:
        The scores and the pairs of texts.

    Raises:
        DagerError: The batch is empty, nothing in it could be recovered, the task is unknown, or it is `masked`
            and the tokenizer has no mask token.
    """
    if task not in TASKS:
        raise DagerError(f"task {quote(task)} is unknown: choose one of {', '.join(TASKS)}")
    if not texts:
        raise DagerError("the batch is empty: give the texts that the client trained on")
    sequences = encode(model.tokenizer, texts, max_length)
    batch = seen_tokens(sequences, model, task, seed)
    special = frame_ids(model.tokenizer)
    counts = Counter(truth for truth in batch if not special.issuperset(truth))
    if not counts:
        raise DagerError(f"nothing to score: no text of the batch has a token to recover with task {task!r}")
    truths = sorted(counts)  # both sides sorted: no order can decide between equally good assignments
    sequences_and_texts = zip(reconstruction.sequences, reconstruction.texts, strict=True)
    recovered = sorted((tuple(ids), text) for ids, text in sequences_and_texts)
    columns = _assign(truths, counts, [ids for ids, _ in recovered], special)
    assigned = [((), "") if column is None else recovered[column] for column in columns]
    shown = dict(zip(truths, (text for _, text in assigned), strict=True))
    return Score(
        **_average(truths, counts, [ids for ids, _ in assigned], special),
        batch_size=len(texts),
        n_tokens=sum(map(len, sequences)),
        hidden_size=int(model.network.config.hidden_size),
        pairs=tuple((text, shown.get(truth, "")) for text, truth in zip(texts, batch, strict=True)),
    )


def seen_tokens(sequences: list[list[int]], model: LanguageModel, task: str, seed: int = 0) -> list[Ids]:
    """The tokens of each text that entered the network and its gradient: the truth of a reconstruction.

    Args:
        sequences: Token ids of each text, as `client.encode` gives them.
        model: The model that both sides share.
        task: See `score`.
        seed: See `score`.

    Raises:
        DagerError: The task is `masked` and the tokenizer has no mask token.
    """
    if task == "masked":
        sequences, _ = masked_inputs(model.tokenizer, sequences, seed)
    return [tuple(ids[:-1] if task == "next_token" else ids) for ids in sequences]


def _plain(ids: Ids, special: frozenset[int]) -> Ids:
    return tuple(index for index in ids if index not in special)


def _measure(truth: Ids, recovered: Ids, special: frozenset[int]) -> dict[str, float]:
    """The measures of `Score` for one truth and the sequence assigned to it, () if there is none."""
    plain = _plain(truth, special)
    words = (" ".join(map(str, ids)) for ids in (plain, _plain(recovered, special)))
    measures = {name: float(rouge.fmeasure) for name, rouge in ROUGE.score(*words).items()}
    measures["exact"] = float(truth == recovered)
    if len(plain) == 1:
        measures["rouge2"] = measures["exact"]
    hits = (a == b for a, b in zip(truth, recovered, strict=False) if a not in special)
    return measures | {"token_accuracy": sum(hits) / len(plain)}


def _average(
    truths: Sequence[Ids], counts: Counter[Ids], assigned: Sequence[Ids], special: frozenset[int]
) -> dict[str, float]:
    """Means over the batch: of the texts for ROUGE and exact, of the tokens for the token accuracy."""
    measures = [_measure(*pair, special) for pair in zip(truths, assigned, strict=True)]
    texts = [counts[truth] for truth in truths]
    tokens = [counts[truth] * len(_plain(truth, special)) for truth in truths]
    return {
        name: float(np.average([m[name] for m in measures], weights=tokens if name == "token_accuracy" else texts))
        for name in measures[0]
    }


def _assign(
    truths: Sequence[Ids], counts: Counter[Ids], recovered: Sequence[Ids], special: frozenset[int]
) -> list[int | None]:
    """For each truth the index of its recovered sequence, None where none is left that shares a token."""
    gain = _gain(truths, recovered, special) * np.array([[counts[truth]] for truth in truths])
    related = np.flatnonzero(gain.any(axis=0))  # others must not even decide between equally good assignments
    columns: list[int | None] = [None] * len(truths)
    for row, column in zip(*linear_sum_assignment(gain[:, related], maximize=True), strict=True):
        if gain[row, related[column]] > 0:
            columns[row] = int(related[column])
    return columns


def _gain(truths: Sequence[Ids], recovered: Sequence[Ids], special: frozenset[int]) -> NDArray[np.float64]:
    """ROUGE-1 + ROUGE-2 + exact of every pair, 0 to 3, truths x recovered.

    The same values as `_measure` in milliseconds instead of seconds for 128 x 128 pairs.
    """
    rows, columns = ([_plain(ids, special) for ids in sequences] for sequences in (truths, recovered))
    exact = np.array([truth == ids for truth in truths for ids in recovered], float)
    exact = exact.reshape(len(truths), len(recovered))
    one_token = np.array([[len(ids) == 1] for ids in rows])
    return _rouge_n(rows, columns, 1) + np.where(one_token, exact, _rouge_n(rows, columns, 2)) + exact


def _rouge_n(rows: Sequence[Ids], columns: Sequence[Ids], n: int) -> NDArray[np.float64]:
    """ROUGE-n F-measures, rows x columns: twice the common n-grams over the n-grams of both."""
    numbers: dict[tuple[Ids, int], int] = {}
    left, right = ([_numbered_ngrams(ids, n, numbers) for ids in side] for side in (rows, columns))
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
