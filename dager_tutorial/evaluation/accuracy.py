"""How much of many batches comes back, for models of either kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.evaluation.metrics import score, wanted
from dager_tutorial.evaluation.rows import distinct_rows
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import Progress


class Batch(NamedTuple):
    """A batch of a series.

    Attributes:
        data: Name or file of the texts.
        seed: Seed that drew them.
        texts: The texts.
        labels: One class per text; alternating 0 and 1 where None.
    """

    data: str
    seed: int
    texts: Sequence[str]
    labels: Sequence[int] | None = None


@dataclass(frozen=True)
class AccuracyRun:
    """What an attack made of one batch of a series.

    Attributes:
        data: Name or file of the texts.
        batch_size: Number of texts.
        seed: Seed that drew them.
        n_tokens: Number of tokens that the client trained on.
        rows: Different rows to find: beginnings of texts for a causal model, tokens of different texts for an encoder.
        exact: Fraction of the texts recovered exactly.
        false: Number of recovered sequences that are no text of the batch.
        rouge1: ROUGE-1 of the assigned pairs, 0 to 1.
        rouge2: ROUGE-2 likewise.
        status: The attack's status.
        seconds: Seconds that the attack took.
        peak_rss_mb: Peak resident memory of the process so far, in megabytes.
    """

    data: str
    batch_size: int
    seed: int
    n_tokens: int
    rows: int
    exact: float
    false: int
    rouge1: float
    rouge2: float
    status: str
    seconds: float
    peak_rss_mb: float

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the attributes."""
        return asdict(self)


def bench_accuracy(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    config: ClientConfig,
    progress: Progress | None = None,
) -> Iterator[AccuracyRun]:
    """Attack a series of batches and compare with the truth.

    Args:
        model: A causal model or an encoder.
        batches: The series.
        config: What the client does.
        progress: Called with the stage, what is done and the total or None.

    Yields:
        One record a batch.

    Raises:
        DagerError: A batch cannot be used, or the model cannot do what is asked.
    """
    causal = adapter_for(model.network).causal
    for batch in batches:
        update, truth = play(model, batch.texts, batch.labels, config=config)
        yield compared(attack(model, update, progress=progress), truth, batch, causal=causal)


def compared(found: Reconstruction, truth: Truth, batch: Batch, *, causal: bool) -> AccuracyRun:
    """Compare a reconstruction with the batch that gave its update.

    Args:
        found: What an attack returned.
        truth: What the client kept.
        batch: Where the texts came from.
        causal: Whether the model is causal.
    """
    points = score(found, truth)
    return AccuracyRun(
        data=batch.data,
        batch_size=points.batch_size,
        seed=batch.seed,
        n_tokens=points.n_tokens,
        rows=distinct_rows(truth.sequences, causal=causal),
        exact=points.exact,
        false=len(set(found.sequences) - set(wanted(found, truth))),
        rouge1=points.rouge1,
        rouge2=points.rouge2,
        status=found.status.value,
        seconds=found.seconds["total"],
        peak_rss_mb=found.peak_rss_mb,
    )
