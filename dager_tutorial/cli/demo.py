"""The demonstration behind `make demo`: eight private notes, a real language model, one gradient."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from dager_tutorial.cli import display
from dager_tutorial.server.attack import attack
from dager_tutorial.client.step import client_update
from dager_tutorial.data import load_texts
from dager_tutorial.server.evidence import inspect_update
from dager_tutorial.evaluation.metrics import score
from dager_tutorial.update import Update

if TYPE_CHECKING:
    from dager_tutorial.models.language_model import LanguageModel

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
SHOWN_TENSORS = 8  # the attention maps of two blocks: enough to see what a gradient looks like
WATCHING = Console(stderr=True)


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
    notes = load_texts("notes")[:batch_size]
    texts = [note.text for note in notes]
    console.print(
        display.opening("DAGER: what a gradient gives away", OPENING.format(model=model.name, size=len(texts)))
    )
    start = time.perf_counter()
    with display.waiting(WATCHING, "the client computes its update"):
        update = client_update(model, texts, [note.label for note in notes], share="attention", seed=seed)
    captured = time.perf_counter() - start
    _return_memory()
    _show_received(console, model, update)
    with display.progress(WATCHING) as advance:
        found = attack(model, update, progress=advance)
    points = score(found, texts, model)
    _show(console, "2  What the server recovered", display.status_line(found))
    console.print(display.beside_table(points.pairs, points.exact == 1))
    times = {"client's update": captured} | {stage: found.seconds[stage] for stage in display.STAGES}
    _show(console, "3  The scores", display.scores_table(points.to_json()))
    _show(console, "4  Where the time went", display.times_table(times))
    console.print()
    console.print(CLOSING.format(width=points.hidden_size), style="italic")
    return found.to_json() | points.to_json()


def _return_memory() -> None:
    """Hand back what the client freed: glibc would keep 200 MB of activations."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries do it themselves
        ctypes.CDLL(None).malloc_trim(0)


def _show_received(console: Console, model: LanguageModel, update: Update) -> None:
    """Print names, shapes and ranks of the first tensors, and how many more there are."""
    first = dict(list(update.gradients.items())[:SHOWN_TENSORS])
    shapes = {name: tuple(tensor.shape) for name, tensor in update.gradients.items()}
    numbers = sum(tensor.numel() for tensor in update.gradients.values())
    note = f"{len(shapes)} tensors, {numbers / 1e6:.1f} million numbers, not one word"
    _show(console, "1  What the server received", display.tensors_table(shapes, len(first) // 2), note)
    console.print(display.ranks_table(inspect_update(model, Update(first)).rows))


def _show(console: Console, title: str, part: RenderableType, note: str = "") -> None:
    """Print a titled part of the demonstration."""
    console.print()
    console.print(display.heading(title, note))
    console.print(part)
