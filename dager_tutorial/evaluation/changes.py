"""What a client could do to its update before it sends it: clip, add noise, round, send less.

Every change is made on the update as an object, after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dager_tutorial.client.defenses.chain import Defence, protected
from dager_tutorial.client.defenses.clipping import Clipping, length, size
from dager_tutorial.client.defenses.noise import Noise
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.client.defenses.withholding import Withholding
from dager_tutorial.evaluation.parts import ATTENTION, EMBEDDINGS, HEAD, Part, parts_of_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update

UNCHANGED, CLIPPING, NOISE, ROUNDING, SHARING = "as sent", "clipping", "noise", "rounding", "sharing"
NOISE_LEVELS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)
"""Length of the noise over that of the update."""


@dataclass(frozen=True)
class Change:
    """One thing that a client could do to its update before it sends it.

    Attributes:
        kind: One of `UNCHANGED`, `CLIPPING`, `NOISE`, `ROUNDING`, `SHARING`.
        name: What is done, in a few words.
        level: How much, in the unit of its kind: the factor of clipping, the length of the noise over the update's,
            the bits of a number, the share of the numbers that is still sent.
        make: Makes the changed update; the one given stays as it is.
    """

    kind: str
    name: str
    level: float
    make: Callable[[Update], Update]


def usual_changes(model: LanguageModel, update: Update) -> tuple[Change, ...]:
    """The ladder: the update as it is, clipped, with noise, rounded, and with fewer tensors.

    Args:
        model: The model both sides know.
        update: What the client sent.

    Raises:
        UpdateError: The update does not belong to the model.
    """
    return (
        Change(UNCHANGED, "as it was sent", 1.0, lambda update: update),
        _changed(CLIPPING, "clipped to a tenth of its norm", 0.1, Clipping(0.1 * length(update.gradients))),
        *_noises(update),
        _changed(ROUNDING, "every number rounded to bfloat16", 16, Rounding("bfloat16")),
        _changed(ROUNDING, "every number rounded to float16", 16, Rounding("float16")),
        _changed(ROUNDING, "every number rounded to 8 bits (int8)", 8, Rounding("int8")),
        *_fewer(model, update),
    )


def _noises(update: Update) -> Iterator[Change]:
    """Noise from hardly any to that of differential privacy, which is as large on every number as the whole update."""
    for level in NOISE_LEVELS:
        yield _changed(NOISE, f"noise as long as {100 * level:g} % of the update", level, noise_as_long(update, level))
    private = math.sqrt(size(update.gradients))
    name = "noise of differential privacy, multiplier 1 at this norm"
    yield _changed(NOISE, name, private, noise_as_long(update, private))


def _changed(kind: str, name: str, level: float, defence: Defence) -> Change:
    """A client's defence as a change."""
    return Change(kind, name, level, lambda update: protected(update, [defence])[0])


def noise_as_long(update: Update, level: float) -> Noise:
    """Noise of a length that is given as a share of an update's.

    Args:
        update: What the client sent.
        level: Length of the noise over the length of the update.
    """
    return Noise(level * length(update.gradients) / math.sqrt(size(update.gradients)))


def selections(model: LanguageModel, update: Update) -> dict[str, Withholding]:
    """Smaller selections of an update's tensors, each where it leaves something out and something in.

    Args:
        model: The model both sides know.
        update: What the client would send.

    Returns:
        What sends each of them, by its name.

    Raises:
        UpdateError: The update does not belong to the model.
    """
    parts = parts_of_update(model, update)
    blocks = 1 + max((part.block for part in parts.values() if part.block is not None), default=0)
    choices: dict[str, Callable[[Part], bool]] = {
        "without the embeddings": lambda part: part.kind != EMBEDDINGS,
        "without embeddings and head": lambda part: part.kind not in (EMBEDDINGS, HEAD),
        "attention alone": lambda part: part.kind == ATTENTION,
        "without attention": lambda part: part.kind != ATTENTION,
        "without block 0": lambda part: part.block != 0,
        f"without the first {blocks // 2} of {blocks} blocks": lambda part: (
            part.block is None or part.block >= blocks // 2
        ),
    }
    found: dict[frozenset[str], Withholding] = {}
    for name, keep in choices.items():
        names = frozenset(each for each, part in parts.items() if keep(part))
        if names and names != frozenset(parts):
            found.setdefault(names, Withholding(names, name))
    return {each.told: each for each in found.values()}


def _fewer(model: LanguageModel, update: Update) -> Iterator[Change]:
    """Less of the update."""
    total = size(update.gradients)
    for name, kept in selections(model, update).items():
        yield _changed(SHARING, name, size(kept(update.gradients)) / total, kept)
