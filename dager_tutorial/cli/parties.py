"""The commands that play the parties of federated learning: client, server, and whoever knows what both know.

Commands of the server's side (`recover`, `inspect`) read an update file and a model, never a batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from rich.console import RenderableType
from typer import Argument, Option

from dager_tutorial.cli import display, output
from dager_tutorial.cli.defenses import DefenseOptions
from dager_tutorial.cli.head import HeadOptions
from dager_tutorial.cli.options import (
    BatchOptions,
    ClientOptions,
    Completion,
    Labels,
    ModelOptions,
    OutputOptions,
    Prompt,
    Seed,
    TimeBudget,
    TruthOptions,
    flattened,
)
from dager_tutorial.cli.progress import progress, stoppable, waiting
from dager_tutorial.cli.training import TrainingOptions
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.client.batch import Truth
    from dager_tutorial.client.config import ClientConfig
    from dager_tutorial.evaluation.metrics import Score
    from dager_tutorial.models.heads import Head
    from dager_tutorial.models.language_model import LanguageModel
    from dager_tutorial.reconstruction import Reconstruction
    from dager_tutorial.server.budget import AttackConfig
    from dager_tutorial.update import Update

UNDEFENDED = DefenseOptions()
UpdateFile = Annotated[
    Path, Argument(metavar="UPDATE", help="A safetensors file of named gradients, or a checkpoint's optimizer.pt.")
]
Before = Annotated[
    Path | None, Option("--before", help="The optimizer.pt of one step earlier, where UPDATE is a later one.")
]


@flattened
def capture(
    *,
    model: ModelOptions,
    out: Annotated[Path, Option("--out", "-o", callback=output.writable, help="The safetensors file to write.")],
    batch: BatchOptions,
    label: Labels = None,
    client: ClientOptions,
    training: TrainingOptions,
    defences: DefenseOptions,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Play the client: compute the update of a private batch and write it as safetensors."""
    texts, labels = batch.draw(seed, label)
    case = computed(model, texts, labels, client.config(seed), training, defences)
    update = case.update
    update.save(out)
    numbers = sum(tensor.numel() for tensor in update.gradients.values())
    record = {"update": str(out), "model": model.model, "kind": update.kind, "tensors": len(update.gradients)}
    record |= {"numbers": numbers, "batch_size": len(texts), **case.defences}
    results.finish(record, display.facts(record))


@flattened
def recover(
    *,
    update: UpdateFile,
    model: ModelOptions,
    head: HeadOptions,
    before: Before = None,
    completion: Completion = True,
    prompt: Prompt = "",
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Play the server: recover the batch from an update file, the model and its head, and from nothing else."""
    limits, known = limits_of(seed, time_budget, completion, prompt), head.load(seed)
    found = attacked(*received(update, model, before), known, limits)
    table = display.recovered_table(found) if found.sequences else "nothing was recovered"
    results.finish(found.to_json(), display.status_lines(found), table, display.times_table(found.seconds))


@flattened
def score(
    *,
    result: Annotated[Path, Argument(metavar="RESULT", help="What `dager recover --json` wrote.")],
    model: ModelOptions,
    batch: BatchOptions,
    client: TruthOptions,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Compare what `dager recover` found with the true batch, given or drawn as for `dager capture`."""
    found = output.read_result(result)
    texts, labels = batch.draw(seed)
    config, language_model = client.config(seed), model.load()
    from dager_tutorial.client.batch import truth_of
    from dager_tutorial.evaluation import metrics

    points = metrics.score(found, truth_of(language_model, texts, labels, config=config))
    results.finish(points.to_json(), *_compared(points))


@flattened
def attack(
    *,
    model: ModelOptions,
    batch: BatchOptions,
    label: Labels = None,
    client: ClientOptions,
    training: TrainingOptions,
    defences: DefenseOptions,
    completion: Completion = True,
    prompt: Prompt = "",
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Capture, recover and score in one go: how much would this batch give away?"""
    texts, labels = batch.draw(seed, label)
    config, limits = client.config(seed), limits_of(seed, time_budget, completion, prompt)
    case = computed(model, texts, labels, config, training, defences)
    from dager_tutorial.evaluation import metrics

    found = attacked(case.model, case.update, case.head, limits)
    points = metrics.score(found, case.truth)
    defended = [display.facts(case.defences)] if case.defences else []
    shown = (*defended, display.status_lines(found), *_compared(points), display.times_table(found.seconds))
    results.finish(case.defences | found.to_json() | points.to_json(), *shown)


@flattened
def inspect(
    *, update: UpdateFile, model: ModelOptions, before: Before = None, seed: Seed = 0, results: OutputOptions
) -> None:
    """Show an update's ranks, noise floors and what can be expected of an attack."""
    from dager_tutorial.server.inspection import inspect_update

    language_model, loaded = received(update, model, before)
    inspection = inspect_update(language_model, loaded)
    facts = {"update": update, "kind": loaded.kind, "tensors": len(loaded.gradients)}
    about = display.facts(facts | ({"defences": loaded.defences} if loaded.defences else {}))
    results.finish(inspection.to_json(), about, display.ranks_table(inspection.rows), inspection.verdict)


def received(path: Path, model: ModelOptions, before: Path | None) -> tuple[LanguageModel, Update]:
    """The model and the update, which a checkpoint's optimiser state names by the model's parameters.

    Args:
        path: The update's file, or a checkpoint.
        model: Which model.
        before: The checkpoint one step earlier.

    Raises:
        DagerError: One of them cannot be read.
    """
    from dager_tutorial.optimizer_state import is_optimizer_state, update_of_state
    from dager_tutorial.update import Update

    if is_optimizer_state(path):
        language_model = model.load()
        return language_model, update_of_state(language_model, path, before)
    if before is not None:
        raise DagerError("--before belongs to an optimizer.pt: an update file needs none")
    loaded = Update.load(path)
    return model.load(), loaded


class Computed(NamedTuple):
    """An update that was computed here, and what belongs to it.

    Attributes:
        model: The model both sides know.
        update: What the client sends.
        truth: What it knows.
        head: The head that it got.
        defences: What there is to say of its defences; empty where it has none.
    """

    model: LanguageModel
    update: Update
    truth: Truth
    head: Head
    defences: dict[str, Any]


def computed(
    model: ModelOptions,
    texts: list[str],
    labels: list[int] | None,
    config: ClientConfig,
    training: TrainingOptions,
    defences: DefenseOptions = UNDEFENDED,
) -> Computed:
    """The update that a client sends, and what belongs to it.

    Args:
        model: The model both sides know.
        texts: The private batch.
        labels: Its classes.
        config: What the client does in a step.
        training: How many steps it takes.
        defences: What it does against an attack.

    Raises:
        DagerError: The model or the batch cannot be had.
    """
    if defences.epsilon is not None and training.epochs is not None:
        raise DagerError("--epsilon is DP-SGD of one step: leave out --epochs and what belongs to it")
    local, language_model = training.local(), model.load()
    from dager_tutorial.client.defended import play_defended, played
    from dager_tutorial.client.step import head_of

    with waiting("computing the client's update"):
        if defences == UNDEFENDED:
            update, truth = played(language_model, texts, labels, config=config, training=local)
            return Computed(language_model, update, truth, head_of(config, truth.labels), {})
        protection = defences.protection()
        sent = play_defended(language_model, texts, labels, config=config, training=local, protection=protection)
    return Computed(language_model, sent.update, sent.truth, head_of(config, sent.truth.labels), sent.to_json())


def limits_of(seed: int, time_budget: float | None, complete: bool, prompt: str = "") -> AttackConfig:
    """What the attack may cost.

    Args:
        seed: Seed of the search.
        time_budget: Seconds; None for no limit.
        complete: Whether to prove what was found.
        prompt: What every text is said to begin with.
    """
    from dager_tutorial.server.budget import AttackConfig

    return AttackConfig(seed=seed, time_budget=time_budget, complete=complete, prompt=prompt)


def attacked(model: LanguageModel, update: Update, head: Head | None, limits: AttackConfig) -> Reconstruction:
    """Recover the batch from the update, with a progress bar where somebody watches; Ctrl-C gives what was found.

    Args:
        model: The model both sides know.
        update: What the client sent.
        head: See `server.attack.attack`.
        limits: What it may cost.
    """
    from dager_tutorial.server.attack import attack

    with progress() as advance, stoppable() as stop:
        return attack(model, update, head=head, config=replace(limits, stop=stop), progress=advance)


def _compared(points: Score) -> tuple[RenderableType, ...]:
    return display.beside_table(points.pairs), display.scores_table(points.to_json())
