"""The demonstration behind `make demo`: eight private notes, a real language model, one gradient."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console, RenderableType
from typer import Option

from dager_tutorial.cli import display, output
from dager_tutorial.cli.options import ModelOptions, OutputOptions, Seed, flattened
from dager_tutorial.cli.progress import progress, waiting

if TYPE_CHECKING:
    from dager_tutorial.client.batch import Truth
    from dager_tutorial.evaluation.metrics import Score
    from dager_tutorial.models.heads import Head
    from dager_tutorial.models.language_model import LanguageModel
    from dager_tutorial.reconstruction import Reconstruction
    from dager_tutorial.update import Update

OPENING = (
    "A client trains {model} for one step on {size} private notes. It keeps the notes, their labels and "
    "their number to itself and sends only the gradient of its attention layers, as federated learning asks. "
    "The server knows the model and reads the gradient."
)
CLOSING = (
    "What stops it: secure aggregation over many clients, and the noise of differential privacy. More distinct "
    "prefixes than the {width} dimensions of the model only make it harder. Keeping the embedding gradient, "
    "head and labels secret does not help."
)
SHOWN_MODEL = ModelOptions("smollm2-135m")
SHOWN_TENSORS = 8  # the attention maps of two blocks: enough to see what a gradient looks like


@flattened
def demo(
    *,
    model: ModelOptions = SHOWN_MODEL,
    batch_size: Annotated[int, Option("--batch-size", min=1, max=60, help="Number of private notes.")] = 8,
    svg: Annotated[
        Path | None, Option("--svg", callback=output.writable, help="Save what is shown as a picture.")
    ] = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Watch a real language model's gradient give up private notes."""
    console = Console(record=svg is not None, highlight=False)
    results.finish(run_demo(console, model.load(), batch_size, seed))
    if svg is not None:
        output.write_svg(svg, console, "dager demo")


def run_demo(console: Console, model: LanguageModel, batch_size: int, seed: int) -> dict[str, Any]:
    """Capture, attack, score, and show each step.

    Args:
        console: Where to print.
        model: The model of client and server.
        batch_size: Number of notes, the first of the project's.
        seed: Seed of the client's head.

    Returns:
        What `dager attack` writes as JSON.
    """
    from dager_tutorial.evaluation.metrics import score
    from dager_tutorial.server.attack import attack

    console.print(
        display.opening("DAGER: what a gradient gives away", OPENING.format(model=model.name, size=batch_size))
    )
    update, truth, head, captured = _captured(model, batch_size, seed)
    _show_received(console, model, update)
    with progress() as advance:
        found = attack(model, update, head=head, progress=advance)
    points = score(found, truth)
    _show_recovered(console, found, points, captured)
    return found.to_json() | points.to_json()


def _captured(model: LanguageModel, batch_size: int, seed: int) -> tuple[Update, Truth, Head, float]:
    """The client's part: its update, the truth for the score, the head that it got, and the seconds that it took."""
    from dager_tutorial.client.config import ClientConfig
    from dager_tutorial.client.step import head_of, play
    from dager_tutorial.data import load_texts
    from dager_tutorial.stopwatch import return_memory

    notes = load_texts("notes")[:batch_size]
    texts, labels = [note.text for note in notes], [note.label for note in notes]
    config, start = ClientConfig(share="attention", seed=seed), time.perf_counter()
    with waiting("the client computes its update"):
        update, truth = play(model, texts, labels, config=config)
    captured = time.perf_counter() - start
    return_memory()  # 200 MB of activations
    return update, truth, head_of(config, labels), captured


def _show_received(console: Console, model: LanguageModel, update: Update) -> None:
    """Print names, shapes and ranks of the first tensors, and how many more there are."""
    from dager_tutorial.server.inspection import inspect_update
    from dager_tutorial.update import Update

    first = dict(list(update.gradients.items())[:SHOWN_TENSORS])
    shapes = {name: tuple(tensor.shape) for name, tensor in update.gradients.items()}
    numbers = sum(tensor.numel() for tensor in update.gradients.values())
    note = f"{len(shapes)} tensors, {numbers / 1e6:.1f} million numbers, not one word"
    _show(console, "1  What the server received", display.tensors_table(shapes, len(first) // 2), note)
    console.print(display.ranks_table(inspect_update(model, Update(first)).rows))


def _show_recovered(console: Console, found: Reconstruction, points: Score, captured: float) -> None:
    """Print texts, scores and times, and what stops the attack."""
    _show(console, "2  What the server recovered", display.status_lines(found))
    console.print(display.beside_table(points.pairs))
    _show(console, "3  The scores", display.scores_table(points.to_json()))
    times = {"client's update": captured} | {stage: found.seconds[stage] for stage in display.STAGES}
    _show(console, "4  Where the time went", display.times_table(times))
    console.print()
    console.print(CLOSING.format(width=points.hidden_size), style="italic")


def _show(console: Console, title: str, part: RenderableType, note: str = "") -> None:
    """Print a titled part of the demonstration."""
    console.print()
    console.print(display.heading(title, note))
    console.print(part)
