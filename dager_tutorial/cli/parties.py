"""The commands that play the parties of federated learning: client, server, and whoever knows what both know.

Commands of the server's side (`recover`, `inspect`) read an update file and a model, never a batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import RenderableType
from typer import Argument, Option

from dager_tutorial.cli import display, output
from dager_tutorial.cli.options import (
    BatchOptions,
    ClientOptions,
    Completion,
    HeadOptions,
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
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Play the client: compute the update of a private batch and write it as safetensors."""
    texts, labels = batch.draw(seed, label)
    _, update, _, _ = computed(model, texts, labels, client.config(seed), training)
    update.save(out)
    numbers = sum(tensor.numel() for tensor in update.gradients.values())
    record = {"update": str(out), "model": model.model, "kind": update.kind, "tensors": len(update.gradients)}
    record |= {"numbers": numbers, "batch_size": len(texts)}
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
    completion: Completion = True,
    prompt: Prompt = "",
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Capture, recover and score in one go: how much would this batch give away?"""
    texts, labels = batch.draw(seed, label)
    config, limits = client.config(seed), limits_of(seed, time_budget, completion, prompt)
    language_model, update, truth, head = computed(model, texts, labels, config, training)
    from dager_tutorial.evaluation import metrics

    found = attacked(language_model, update, head, limits)
    points = metrics.score(found, truth)
    shown = (display.status_lines(found), *_compared(points), display.times_table(found.seconds))
    results.finish(found.to_json() | points.to_json(), *shown)


@flattened
def inspect(
    *, update: UpdateFile, model: ModelOptions, before: Before = None, seed: Seed = 0, results: OutputOptions
) -> None:
    """Show an update's ranks, noise floors and what can be expected of an attack."""
    from dager_tutorial.server.inspection import inspect_update

    language_model, loaded = received(update, model, before)
    inspection = inspect_update(language_model, loaded)
    about = display.facts({"update": update, "kind": loaded.kind, "tensors": len(loaded.gradients)})
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


def computed(
    model: ModelOptions, texts: list[str], labels: list[int] | None, config: ClientConfig, training: TrainingOptions
) -> tuple[LanguageModel, Update, Truth, Head]:
    """The model, the update that a client sends, what the client knows, and the head that it got.

    Args:
        model: The model both sides know.
        texts: The private batch.
        labels: Its classes.
        config: What the client does in a step.
        training: How many steps it takes.

    Raises:
        DagerError: The model or the batch cannot be had.
    """
    rounds, language_model = training.plan(), model.load()
    from dager_tutorial.evaluation.capture import captured

    with waiting("computing the client's update"):
        return language_model, *captured(language_model, texts, labels, config, rounds)


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
