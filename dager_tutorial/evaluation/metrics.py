"""How much of a batch came back: the truth that the client kept beside what the server found.

Chapter `10_whole_attack`.

This is the one place where a reconstruction meets the truth. Recovered sequences come in no order, so an optimal
assignment pairs them with the true texts, by the same rule for every architecture. The DAGER paper (arXiv 2405.15586)
reports ROUGE-1 and ROUGE-2; the fraction of exact texts is stricter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dager_tutorial.client.batch import Truth
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.assignment import assign, without_frame
from dager_tutorial.evaluation.rouge import Ids, rouge_of
from dager_tutorial.reconstruction import Reconstruction


class Pair(NamedTuple):
    """A text of the batch and what came back of it.

    Attributes:
        text: The text as the client has it.
        recovered: The text of the sequence that was assigned to it, "" where none was.
        exact: Whether this sequence is the truth, token by token: texts may differ where tokens do not.
        labels: The labels that were recovered with it, one a copy.
    """

    text: str
    recovered: str
    exact: bool
    labels: tuple[int, ...] = ()


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
        counted: Fraction of the batch's texts that came back as often as they occur: of a text that occurs twice and is
            recovered once, with no count, one is missing.
        labelled: The same with the right label; under other tasks than classification labels are not asked for.
        batch_size: Number of texts.
        n_tokens: Number of tokens that the client trained on, special tokens included, pads never.
        hidden_size: Width of the model's hidden states.
        pairs: For each text in order, what was recovered of it.
    """

    rouge1: float
    rouge2: float
    rougeL: float
    exact: float
    token_accuracy: float
    counted: float
    labelled: float
    batch_size: int
    n_tokens: int
    hidden_size: int
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict[str, float | int]:
        """The numbers, without the texts."""
        return {name: value for name, value in vars(self).items() if name != "pairs"}


class _Found(NamedTuple):
    """A recovered sequence and its text."""

    ids: Ids
    text: str
    labels: tuple[int, ...] = ()


_NOTHING = _Found((), "")


def score(found: Reconstruction, truth: Truth) -> Score:
    """Compare a reconstruction with the true batch.

    The truth is what the client's network saw and an attack can recover (`client.batch.Truth`). A text of which no
    token can be recovered (special tokens aside) is left out of the averages. Texts with the same truth give the same
    rows, which come back once: they are recovered by one sequence, and each of them counts.

    Recovered sequences are assigned to the distinct truths, each used once, so that the sum over the batch of
    ROUGE-1 + ROUGE-2 + exact is largest. Neither the order of the texts nor that of the reconstruction matters.
    Sequences that are assigned to no text cost nothing.

    Args:
        found: What the server found.
        truth: What the client kept: the second result of `client.step.play`, or `client.batch.truth_of`.

    Returns:
        The scores and the pairs of texts.

    Raises:
        DagerError: Nothing in the batch could be recovered.

    See chapter `10_whole_attack`.
    """
    sequences = wanted(found, truth)
    counts = Counter(ids for ids in sequences if not truth.frame.issuperset(ids))
    if not counts:
        raise DagerError(f"nothing to score: no text of the batch has a token to recover with task {truth.task!r}")
    assigned = _assigned(found, counts, truth.frame)
    return Score(
        **_means({ids: one.ids for ids, one in assigned.items()}, counts, truth.frame),
        counted=_share(_copies(found), Counter(sequences)),
        labelled=_share(_labelled(found), Counter(zip(sequences, truth.labels, strict=True))),
        batch_size=len(truth.texts),
        n_tokens=truth.n_tokens,
        hidden_size=truth.hidden_size,
        pairs=tuple(
            _pair(text, ids, assigned.get(ids, _NOTHING)) for text, ids in zip(truth.texts, sequences, strict=True)
        ),
    )


def wanted(found: Reconstruction, truth: Truth) -> tuple[Ids, ...]:
    """What a reconstruction is compared with: whole texts where it holds targets, else what the network saw.

    Args:
        found: What the server found.
        truth: What the client kept.
    """
    return truth.wholes if found.with_targets else truth.sequences


def _pair(text: str, ids: Ids, one: _Found) -> Pair:
    return Pair(text, one.text, bool(ids) and one.ids == ids, one.labels)


def _copies(found: Reconstruction) -> Counter[Any]:
    """Every recovered text, as often as it is said to occur: once where nothing is said."""
    copies = found.copies or [None] * len(found.sequences)
    return Counter({ids: number or 1 for ids, number in zip(found.sequences, copies, strict=True)})


def _labelled(found: Reconstruction) -> Counter[Any]:
    """Every recovered text with each of its labels."""
    pairs = zip(found.sequences, found.labels or [()] * len(found.sequences), strict=True)
    return Counter((ids, label) for ids, labels in pairs for label in labels)


def _share(found: Counter[Any], wanted: Counter[Any]) -> float:
    """The share of what is wanted that was found, each as often as it is wanted."""
    return (found & wanted).total() / wanted.total()


def _assigned(found: Reconstruction, counts: Mapping[Ids, int], frame: frozenset[int]) -> dict[Ids, _Found]:
    """What was recovered of each distinct truth; both sides are sorted, so that no order can decide anything."""
    truths = sorted(counts)
    labels = found.labels or [()] * len(found.sequences)
    recovered = sorted(_Found(*each) for each in zip(found.sequences, found.texts, labels, strict=True))
    columns = assign(truths, [counts[ids] for ids in truths], [one.ids for one in recovered], frame)
    return {ids: _NOTHING if column is None else recovered[column] for ids, column in zip(truths, columns, strict=True)}


def _means(assigned: Mapping[Ids, Ids], counts: Mapping[Ids, int], frame: frozenset[int]) -> dict[str, float]:
    """Means over the batch: of the texts for ROUGE and exact, of the tokens for the token accuracy."""
    measures = [_measure(truth, ids, frame) for truth, ids in assigned.items()]
    texts = [counts[truth] for truth in assigned]
    tokens = [counts[truth] * len(without_frame(truth, frame)) for truth in assigned]
    return {name: _mean(measures, name, tokens if name == "token_accuracy" else texts) for name in measures[0]}


def _mean(measures: Sequence[Mapping[str, float]], name: str, weights: Sequence[int]) -> float:
    return float(np.average([measure[name] for measure in measures], weights=weights))


def _measure(truth: Ids, recovered: Ids, frame: frozenset[int]) -> dict[str, float]:
    """The measures of `Score` for one truth and the sequence assigned to it, () if there is none."""
    plain = without_frame(truth, frame)
    measures = rouge_of(plain, without_frame(recovered, frame))
    measures["exact"] = float(truth == recovered)
    if len(plain) == 1:
        measures["rouge2"] = measures["exact"]
    hits = (a == b for a, b in zip(truth, recovered, strict=False) if a not in frame)
    return measures | {"token_accuracy": sum(hits) / len(plain)}
