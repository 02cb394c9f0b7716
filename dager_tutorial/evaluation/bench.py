"""How long the attack takes beside the textbook version.

The benchmark plays both parties: it computes the client's update, hands nothing but this update to the attacks, and
compares what they found with the truth that the client kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.metrics import score
from dager_tutorial.evaluation.rows import distinct_prefixes
from dager_tutorial.evaluation.timing import Timed, labelled, timed, warm_up
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Progress
from dager_tutorial.textbook.decoder import textbook_attack


@dataclass(frozen=True)
class DecoderBenchmark:
    """One batch, one update, and what the attacks made of it.

    Attributes:
        model: Name of the model.
        batch_size: Number of texts.
        n_tokens: Number of tokens that the client trained on.
        distinct_prefixes: Number of different beginnings of the texts, whole texts included: rows to find.
        hidden_size: Width of the model's hidden states.
        client_seconds: Seconds that computing the update took.
        fast_seconds: Seconds that the attack took.
        attack_cpu_seconds: Seconds of processor time that it took, all threads together.
        fast_stage_seconds: Its seconds by stage.
        textbook_seconds: Seconds that the textbook version took; None where it was not run, as below.
        ratio: `textbook_seconds / fast_seconds`.
        same_sentences: Whether both found the same set of token sequences.
        exact: Fraction of the texts that the attack recovered exactly.
        textbook_exact: Fraction of the texts that the textbook version recovered exactly.
        status: The attack's status.
        peak_rss_mb: Peak resident memory in megabytes after the attack, model and client included.
        threads: Number of CPU threads that torch used.
    """

    model: str
    batch_size: int
    n_tokens: int
    distinct_prefixes: int
    hidden_size: int
    client_seconds: float
    fast_seconds: float
    attack_cpu_seconds: float
    fast_stage_seconds: dict[str, float]
    textbook_seconds: float | None
    ratio: float | None
    same_sentences: bool | None
    exact: float
    textbook_exact: float | None
    status: str
    peak_rss_mb: float
    threads: int

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the attributes."""
        return asdict(self)


def bench_decoder(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    textbook: bool = True,
    progress: Progress | None = None,
) -> DecoderBenchmark:
    """Time the attack and the textbook version on the same update, a classification gradient of one batch.

    Args:
        model: A causal model.
        texts: The batch.
        labels: One class per text; see `client.step.client_update`.
        textbook: Run the textbook version too, after the attack.
        progress: Called with party and stage, what is done and the total or None.

    Returns:
        The measurements, in seconds of wall-clock time unless said otherwise.

    Raises:
        DagerError: The batch cannot be used, or the model is no causal one.
    """
    if not adapter_for(model.network).causal:
        raise DagerError(f"model {model.name!r} is an encoder: use dager bench encoder")
    warm_up(model.device)
    client = timed(lambda: play(model, texts, labels))
    search_only = AttackConfig(complete=False)  # the textbook does no more
    update, truth = client.result
    fast = timed(lambda: attack(model, update, config=search_only, progress=labelled(progress, "attack")))
    slow = timed(lambda: textbook_attack(model, update, progress=labelled(progress, "textbook"))) if textbook else None
    return DecoderBenchmark(
        model=model.name,
        client_seconds=client.seconds,
        threads=torch.get_num_threads(),
        **_batch(truth),
        **_attack(fast, truth),
        **_beside(fast, slow, truth),
    )


def _batch(truth: Truth) -> dict[str, Any]:
    """What `DecoderBenchmark` says of the batch."""
    return {
        "batch_size": len(truth.texts),
        "n_tokens": truth.n_tokens,
        "distinct_prefixes": distinct_prefixes(truth.sequences),
        "hidden_size": truth.hidden_size,
    }


def _attack(fast: Timed[Reconstruction], truth: Truth) -> dict[str, Any]:
    """What `DecoderBenchmark` says of the attack."""
    return {
        "fast_seconds": fast.seconds,
        "attack_cpu_seconds": fast.cpu_seconds,
        "fast_stage_seconds": fast.result.seconds,
        "exact": score(fast.result, truth).exact,
        "status": fast.result.status.value,
        "peak_rss_mb": fast.result.peak_rss_mb,
    }


def _beside(fast: Timed[Reconstruction], slow: Timed[Reconstruction] | None, truth: Truth) -> dict[str, Any]:
    """What `DecoderBenchmark` says of the textbook version, None where it was not run."""
    if slow is None:
        return dict.fromkeys(("textbook_seconds", "ratio", "same_sentences", "textbook_exact"))
    return {
        "textbook_seconds": slow.seconds,
        "ratio": slow.seconds / fast.seconds,
        "same_sentences": set(fast.result.sequences) == set(slow.result.sequences),
        "textbook_exact": score(slow.result, truth).exact,
    }
