"""Attacks by gradient matching, DAGER as its paper writes it, and this project's attack, on the same updates.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dager_tutorial.baselines.prior import Prior
from dager_tutorial.baselines.run import METHODS, Effort, attack_by
from dager_tutorial.baselines.told import Told
from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import head_of, play
from dager_tutorial.evaluation.accuracy import Batch
from dager_tutorial.evaluation.metrics import Score, score
from dager_tutorial.evaluation.timing import labelled, timed
from dager_tutorial.models import adapter_for
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Budget, Progress
from dager_tutorial.textbook.choices import EncoderSearchOptions
from dager_tutorial.textbook.decoder import textbook_attack
from dager_tutorial.textbook.encoder import textbook_encoder_attack
from dager_tutorial.update import Update

OURS, TEXTBOOK = "ours", "textbook"
ATTACKS = (OURS, TEXTBOOK, *METHODS)


@dataclass(frozen=True)
class PriorRun:
    """What one attack made of one update.

    Attributes:
        attack: One of `ATTACKS`.
        data: Name or file of the texts.
        batch_size: Number of texts.
        seed: Seed that drew them.
        n_tokens: Number of tokens that the client trained on.
        rouge1: ROUGE-1 of the assigned pairs, 0 to 1.
        rouge2: ROUGE-2 likewise.
        exact: Fraction of the texts recovered exactly.
        steps: Steps of the optimiser that were done; None where nothing is optimised.
        status: The attack's status.
        seconds: Wall-clock seconds.
    """

    attack: str
    data: str
    batch_size: int
    seed: int
    n_tokens: int
    rouge1: float
    rouge2: float
    exact: float
    steps: int | None
    status: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the attributes."""
        return asdict(self)


@dataclass(frozen=True)
class PriorLimits:
    """What the attacks may cost.

    Attributes:
        effort: Of gradient matching.
        seconds: After which any of them stops; None for no limit.
    """

    effort: Effort
    seconds: float | None = None

    def budget(self, seed: int, progress: Progress | None) -> Budget:
        """The budget of an attack that begins now.

        Args:
            seed: Of what it draws.
            progress: Who listens.
        """
        return Budget.of(AttackConfig(seed=seed, time_budget=self.seconds), time.perf_counter(), progress)


def told_of(truth: Truth, *, labels: bool = True) -> Told:
    """What earlier attacks are told of a batch.

    Args:
        truth: What the client kept.
        labels: Whether they are told the labels, too.
    """
    return Told(tuple(map(len, truth.sequences)), truth.labels if labels else None)


def bench_priors(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    limits: PriorLimits,
    prior: Prior,
    attacks: Sequence[str] = ATTACKS,
    progress: Progress | None = None,
) -> Iterator[PriorRun]:
    """Attack each update in every way and compare with the truth.

    Args:
        model: A causal model or an encoder.
        batches: The series.
        limits: What the attacks may cost.
        prior: The judge of LAMP's moves.
        attacks: Any of `ATTACKS`.
        progress: Called with attack and stage, what is done and the total or None.

    Yields:
        One record for each batch and attack.

    Raises:
        DagerError: A batch cannot be used.
    """
    config = ClientConfig()
    for batch in batches:
        update, truth = play(model, batch.texts, batch.labels, config=config)
        ways = _ways(model, update, truth, limits, prior)
        for name in attacks:
            run = timed(functools.partial(ways[name], labelled(progress, name)))
            found, steps = run.result
            yield _record(name, batch, score(found, truth), found, steps, run.seconds)


_Way = Callable[[Progress | None], tuple[Reconstruction, int | None]]


def _ways(model: LanguageModel, update: Update, truth: Truth, limits: PriorLimits, prior: Prior) -> dict[str, _Way]:
    """The attacks by name. Ours is told the head alone; the textbook's encoder search the batch size, too."""
    head = head_of(ClientConfig(), truth.labels)

    def ours(progress: Progress | None) -> tuple[Reconstruction, None]:
        return attack(
            model, update, head=head, config=AttackConfig(time_budget=limits.seconds), progress=progress
        ), None

    def textbook(progress: Progress | None) -> tuple[Reconstruction, None]:
        return _textbook(model, update, len(truth.texts), limits, progress), None

    def matching(method: str) -> _Way:
        return lambda progress: _matched(method, model, update, truth, head, limits, prior, progress)

    return {OURS: ours, TEXTBOOK: textbook, **{method: matching(method) for method in METHODS}}


def _textbook(
    model: LanguageModel, update: Update, batch_size: int, limits: PriorLimits, progress: Progress | None
) -> Reconstruction:
    """DAGER as the paper writes it, for either kind of model."""
    if adapter_for(model.network).causal:
        return textbook_attack(model, update, progress=progress)
    options = EncoderSearchOptions(candidates_per_position=batch_size, remove_used=True, time_budget=limits.seconds)
    return textbook_encoder_attack(model, update, options=options, progress=progress)


def _matched(
    method: str,
    model: LanguageModel,
    update: Update,
    truth: Truth,
    head: Head,
    limits: PriorLimits,
    prior: Prior,
    progress: Progress | None,
) -> tuple[Reconstruction, int]:
    """An attack by gradient matching, told lengths and labels."""
    budget = limits.budget(0, progress)
    run = attack_by(method, model, update, told_of(truth), head=head, prior=prior, effort=limits.effort, budget=budget)
    return run.found, run.steps


def _record(
    name: str, batch: Batch, points: Score, found: Reconstruction, steps: int | None, seconds: float
) -> PriorRun:
    """One row."""
    return PriorRun(
        attack=name,
        data=batch.data,
        batch_size=points.batch_size,
        seed=batch.seed,
        n_tokens=points.n_tokens,
        rouge1=points.rouge1,
        rouge2=points.rouge2,
        exact=points.exact,
        steps=steps,
        status=found.status.value,
        seconds=seconds,
    )


def markdown_table(runs: Iterable[PriorRun]) -> str:
    """The runs as a table in Markdown.

    Args:
        runs: In the order of the rows.
    """
    lines = [
        "| data | B | seed | tokens | attack | steps | R-1 | R-2 | exact | status | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        shares = (f"{100 * share:.1f}" for share in (run.rouge1, run.rouge2, run.exact))
        steps = "" if run.steps is None else str(run.steps)
        cells = (run.data, run.batch_size, run.seed, run.n_tokens, run.attack, steps, *shares)
        lines.append("| " + " | ".join(map(str, cells)) + f" | `{run.status}` | {run.seconds:.1f} |")
    return "\n".join(lines) + "\n"
