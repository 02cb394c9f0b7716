"""What each part of the encoder attack is worth: the attack without it, and the paper's search, on the same updates.

As in `bench`, both parties are played here: the attacks get an update and a model, never the batch. One thing is given
away, because the paper does so: its search is told how many texts the batch has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError, quote
from dager_tutorial.evaluation.accuracy import AccuracyRun, Batch, compared
from dager_tutorial.evaluation.timing import labelled, warm_up
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Progress
from dager_tutorial.textbook.choices import EncoderSearchOptions
from dager_tutorial.textbook.encoder import textbook_encoder_attack
from dager_tutorial.update import Update

WITHOUT: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "no incidence": frozenset({"incidence"}),
    "no relaxation": frozenset({"relaxation"}),
    "no polish": frozenset({"polish"}),
}
"""The variants of the attack, and what each does without: see `AttackConfig.without`."""
TEXTBOOK = "textbook"
VARIANTS = (*WITHOUT, TEXTBOOK)
# Texts of each length that the paper's search tests at most. Ten million, as in the paper, take days on a CPU.
CAP = 20_000

Plan = AttackConfig | EncoderSearchOptions


@dataclass(frozen=True)
class EncoderBenchmark:
    """What one variant of the attack made of one batch of a series.

    Attributes:
        variant: One of `VARIANTS`.
        run: What came of it.
    """

    variant: str
    run: AccuracyRun

    def to_json(self) -> dict[str, Any]:
        """The run's record as JSON types, and the variant."""
        return self.run.to_json() | {"variant": self.variant}


@dataclass(frozen=True)
class EncoderAverage:
    """What one variant made of all batches of one size from one source.

    Attributes:
        data: Name or file of the texts.
        batch_size: Number of texts in each batch.
        variant: One of `VARIANTS`.
        batches: Number of batches.
        rouge1: Mean ROUGE-1, 0 to 1.
        exact: Fraction of all texts recovered exactly.
        false: Number of recovered sequences that are no text of their batch, all batches together.
        seconds: Mean seconds of a batch.
    """

    data: str
    batch_size: int
    variant: str
    batches: int
    rouge1: float
    exact: float
    false: int
    seconds: float


def bench_encoder(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    variants: Sequence[str] = VARIANTS,
    cap: int = CAP,
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> Iterator[EncoderBenchmark]:
    """Attack a series of batches with and without parts of the attack, and the way the paper does.

    All variants get the same update of a batch, a classification gradient of the attention layers. The paper's
    search, here `textbook`, keeps as many candidates of each position as the batch has texts, takes the tokens of
    found texts away, and draws `cap` texts of a length where there are more. The batch size is something that the
    server does not know: this favours the textbook.

    Args:
        model: A bidirectional model.
        batches: The series.
        variants: Which of `VARIANTS` to run on each batch, in this order.
        cap: Texts of one length that the textbook version tests at most; ten million in the paper.
        time_budget: Seconds after which a search returns what it has; None for no limit.
        progress: Called with variant and stage, what is done and the total or None.

    Returns:
        An iterator that makes one record for each batch and variant.

    Raises:
        DagerError: The model is causal, a variant is unknown, or a limit cannot be kept.

    See chapter `08_encoder_recovery`, and Petrov et al., DAGER, NeurIPS 2024 for the paper's search.
    """
    if adapter_for(model.network).causal:
        raise DagerError(f"model {model.name!r} is causal: use dager bench accuracy")
    plans = {variant: _plan(variant, cap, time_budget) for variant in variants}
    return _runs(model, batches, plans, progress)


def averages(runs: Iterable[EncoderBenchmark]) -> list[EncoderAverage]:
    """Average runs over the batches of one size from one source, for each variant, in the order of the runs.

    Args:
        runs: What `bench_encoder` yields.
    """
    groups: dict[tuple[str, int, str], list[AccuracyRun]] = {}
    for each in runs:
        groups.setdefault((each.run.data, each.run.batch_size, each.variant), []).append(each.run)
    return [
        EncoderAverage(
            *kind,
            batches=len(group),
            rouge1=fmean(run.rouge1 for run in group),
            exact=fmean(run.exact for run in group),
            false=sum(run.false for run in group),
            seconds=fmean(run.seconds for run in group),
        )
        for kind, group in groups.items()
    ]


def _plan(variant: str, cap: int, time_budget: float | None) -> Plan:
    """What a variant's search is asked to do."""
    if variant == TEXTBOOK:
        return EncoderSearchOptions(cap=cap, remove_used=True, time_budget=time_budget)
    if variant not in WITHOUT:
        raise DagerError(f"variant {quote(variant)} is unknown: choose from {', '.join(VARIANTS)}")
    return AttackConfig(time_budget=time_budget, without=WITHOUT[variant], complete=False)


def _runs(
    model: LanguageModel, batches: Iterable[Batch], plans: Mapping[str, Plan], progress: Progress | None
) -> Iterator[EncoderBenchmark]:
    warm_up(model.device)
    for batch in batches:
        update, truth = play(model, batch.texts, batch.labels, config=ClientConfig(share="attention"))
        for variant, plan in plans.items():
            found = _found(model, update, plan, len(truth.texts), labelled(progress, variant))
            yield EncoderBenchmark(variant, compared(found, truth, batch, causal=False))


def _found(
    model: LanguageModel, update: Update, plan: Plan, batch_size: int, progress: Progress | None
) -> Reconstruction:
    """Run a search; the textbook version alone is told the batch size."""
    if isinstance(plan, AttackConfig):
        return attack(model, update, config=plan, progress=progress)
    told = replace(plan, candidates_per_position=batch_size)
    return textbook_encoder_attack(model, update, options=told, progress=progress)
