"""How well the attack does and how long it takes, beside the textbook version and as batches grow.

The benchmark plays both parties: it knows the batch, computes the client's update, hands nothing but this
update to the attacks, and compares what they found with the truth through `metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dager_tutorial.server.attack import attack
from dager_tutorial.client.step import client_update, encode
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.metrics import score, seen_tokens
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.textbook.decoder import textbook_attack

Progress = Callable[[str, int, int | None], None]
Batch = tuple[str, int, Sequence[str], Sequence[int] | None]
"""A batch of a series: the name of its texts, the seed that drew it, its texts and labels."""


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
        fast_stage_seconds: The same by stage.
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
        labels: One class per text; see `client.client_update`.
        textbook: Run the textbook version too, after the attack.
        progress: Called with party and stage, what is done and the total or None.

    Returns:
        The measurements, in seconds of wall-clock time.

    Raises:
        DagerError: The batch cannot be used, or the model is no causal one.
    """
    if not adapter_for(model.network).causal:
        raise DagerError(f"model {model.name!r} is an encoder: use dager bench encoder")
    warm_up(model.device)
    start = time.perf_counter()
    update = client_update(model, texts, labels)
    client_seconds = time.perf_counter() - start
    start = time.perf_counter()
    fast = attack(model, update, progress=labelled(progress, "attack"))
    fast_seconds = time.perf_counter() - start
    slow, textbook_seconds = None, None
    if textbook:
        start = time.perf_counter()
        slow = textbook_attack(model, update, progress=labelled(progress, "textbook"))
        textbook_seconds = time.perf_counter() - start
    sequences = encode(model.tokenizer, texts)
    return DecoderBenchmark(
        model=model.name,
        batch_size=len(texts),
        n_tokens=sum(map(len, sequences)),
        distinct_prefixes=distinct_prefixes(sequences),
        hidden_size=int(model.network.config.hidden_size),
        client_seconds=client_seconds,
        fast_seconds=fast_seconds,
        fast_stage_seconds=fast.seconds,
        textbook_seconds=textbook_seconds,
        ratio=None if textbook_seconds is None else textbook_seconds / fast_seconds,
        same_sentences=None if slow is None else same_sentences(fast, slow),
        exact=score(fast, texts, model).exact,
        textbook_exact=None if slow is None else score(slow, texts, model).exact,
        status=fast.status,
        peak_rss_mb=fast.peak_rss_mb,
        threads=torch.get_num_threads(),
    )


def bench_scaling(
    model: LanguageModel,
    batches: Iterable[tuple[Sequence[str], Sequence[int] | None]],
    *,
    progress: Progress | None = None,
) -> list[DecoderBenchmark]:
    """Time the attack on several batches, usually growing ones, without the textbook version.

    The peak memory of each is that of the process so far, so that it only tells in order of size.

    Args:
        model: A causal model.
        batches: Texts and labels of each batch.
        progress: See `bench_decoder`.

    Raises:
        DagerError: See `bench_decoder`.
    """
    return [bench_decoder(model, *batch, textbook=False, progress=progress) for batch in batches]


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
    task: str = "classification",
    dtype: str = "float32",
    share: str = "attention",
    progress: Progress | None = None,
) -> Iterator[AccuracyRun]:
    """Attack a series of batches and compare with the truth.

    Args:
        model: A causal model or an encoder.
        batches: The series.
        task: See `client.client_update`. What masks hide was not seen: the truth is the corrupted text.
        dtype: See `client.client_update`.
        share: See `client.client_update`.
        progress: See `bench_decoder`.

    Yields:
        One record a batch.
    """
    for batch in batches:
        _, _, texts, labels = batch
        update = client_update(model, texts, labels, task=task, dtype=dtype, share=share)
        yield compared(attack(model, update, progress=progress), batch, model, task)


def compared(found: Reconstruction, batch: Batch, model: LanguageModel, task: str = "classification") -> AccuracyRun:
    """Compare a reconstruction with its batch.

    Args:
        found: What an attack returned.
        batch: The batch that the client trained on.
        model: The model.
        task: What the client trained, with the default seed of its masks.
    """
    name, seed, texts, _ = batch
    points = score(found, texts, model, task=task)
    truths = seen_tokens(encode(model.tokenizer, texts), model, task)
    return AccuracyRun(
        data=name,
        batch_size=len(texts),
        seed=seed,
        n_tokens=points.n_tokens,
        rows=distinct_rows(truths, causal=adapter_for(model.network).causal),
        exact=points.exact,
        false=len(set(found.sequences) - set(truths)),
        rouge1=points.rouge1,
        rouge2=points.rouge2,
        status=found.status,
        seconds=found.seconds["total"],
        peak_rss_mb=found.peak_rss_mb,
    )


def distinct_rows(sequences: Iterable[Sequence[int]], *, causal: bool) -> int:
    """Number of different rows that token sequences give: one a beginning, or one a token of each different text.

    >>> texts = [[1, 2, 3], [1, 4], [1, 4]]
    >>> distinct_rows(texts, causal=True), distinct_rows(texts, causal=False)
    (4, 5)
    """
    if causal:
        return distinct_prefixes(sequences)
    return sum(map(len, set(map(tuple, sequences))))


def distinct_prefixes(sequences: Iterable[Sequence[int]]) -> int:
    """Number of different beginnings of token sequences, themselves included.

    >>> distinct_prefixes([[1, 2, 3], [1, 2], [1, 4]])
    4
    """
    return len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


def same_sentences(left: Reconstruction, right: Reconstruction) -> bool:
    """Whether two reconstructions hold the same set of token sequences."""
    return set(left.sequences) == set(right.sequences)


def labelled(progress: Progress | None, party: str) -> Progress | None:
    """The same callback, with the name of a party in front of the stage."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{party}: {stage}", done, total)


def warm_up(device: torch.device) -> None:
    """Let torch load its libraries and start its threads, before the clock runs."""
    matrix = torch.eye(64, dtype=torch.float64, device=device)
    torch.linalg.svd(torch.linalg.qr(matrix @ matrix).R)
    (matrix.float() @ matrix.float()).softmax(-1).sum().item()
