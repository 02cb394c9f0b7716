"""How the cost of an attack grows with its batch: seconds of each stage, of a row, and the exponent of growth."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dager_tutorial.client.step import play
from dager_tutorial.evaluation.metrics import score
from dager_tutorial.evaluation.rows import distinct_rows
from dager_tutorial.evaluation.timing import labelled, timed, warm_up
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import SEARCH_STAGES, attack
from dager_tutorial.server.budget import Progress

SHORTEST = 1e-3
"""Seconds below which a stage says nothing of its growth."""


@dataclass(frozen=True)
class ScalingRun:
    """One batch and what the attack on its update cost.

    Attributes:
        model: Name of the model.
        batch_size: Number of texts.
        n_tokens: Number of tokens that the client trained on.
        rows: Number of different rows of the batch: beginnings for a causal model, tokens for a bidirectional one.
        hidden_size: Width of the model's hidden states.
        seconds: Seconds that the attack took.
        cpu_seconds: Seconds of processor time, all threads together.
        stage_seconds: Its seconds by stage.
        exact: Fraction of the texts that were recovered exactly.
        status: The attack's status.
        peak_rss_mb: Peak resident memory in megabytes so far, model and client included.
        threads: Number of CPU threads that torch used.
    """

    model: str
    batch_size: int
    n_tokens: int
    rows: int
    hidden_size: int
    seconds: float
    cpu_seconds: float
    stage_seconds: dict[str, float]
    exact: float
    status: str
    peak_rss_mb: float
    threads: int

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the attributes."""
        return asdict(self)


def bench_scaling(
    model: LanguageModel,
    batches: Iterable[tuple[Sequence[str], Sequence[int] | None]],
    *,
    progress: Progress | None = None,
) -> Iterator[ScalingRun]:
    """Time the attack on several batches, usually growing ones: classification gradients of any model.

    The peak memory of each is that of the process so far, so that it only tells in order of size.

    Args:
        model: The model.
        batches: Texts and labels of each batch.
        progress: Called with party and stage, what is done and the total or None.

    Yields:
        One record a batch.

    Raises:
        DagerError: A batch cannot be used.
    """
    warm_up(model.device)
    for texts, labels in batches:
        update, truth = play(model, texts, labels)
        spent = timed(functools.partial(attack, model, update, progress=labelled(progress, "attack")))
        yield ScalingRun(
            model=model.name,
            batch_size=len(texts),
            n_tokens=truth.n_tokens,
            rows=distinct_rows(truth.sequences, causal=adapter_for(model.network).causal),
            hidden_size=truth.hidden_size,
            seconds=spent.seconds,
            cpu_seconds=spent.cpu_seconds,
            stage_seconds={stage: spent.result.seconds.get(stage, 0.0) for stage in SEARCH_STAGES},
            exact=score(spent.result, truth).exact,
            status=spent.result.status.value,
            peak_rss_mb=spent.result.peak_rss_mb,
            threads=torch.get_num_threads(),
        )


def growth(runs: Sequence[ScalingRun]) -> dict[str, float | None]:
    """The exponent of growth of each stage, and of the whole: seconds go like rows to this power.

    The slope of the line through logarithms of seconds and rows, by least squares.

    Args:
        runs: At least two batches of different numbers of rows tell something.

    Returns:
        By stage, and under `total`; None where fewer than two batches tell.
    """
    stages = {stage: [run.stage_seconds[stage] for run in runs] for stage in SEARCH_STAGES}
    rows = [run.rows for run in runs]
    return {
        stage: exponent(rows, times) for stage, times in (stages | {"total": [run.seconds for run in runs]}).items()
    }


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The power of its size with which something grows; None where fewer than two sizes tell.

    Args:
        sizes: Positive numbers.
        times: Seconds of each; those below a thousandth are left out.

    Example:
        >>> round(exponent([10, 20, 40], [1.0, 4.0, 16.0]), 6)
        2.0
    """
    points = [(math.log(size), math.log(time)) for size, time in zip(sizes, times, strict=True) if time >= SHORTEST]
    if len({size for size, _ in points}) < 2:
        return None
    middle, level = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((size - middle) ** 2 for size, _ in points)
    return sum((size - middle) * (time - level) for size, time in points) / spread
