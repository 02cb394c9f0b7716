"""What a client could do to its update before it sends it: clip, add noise, round, send less.

Every change is made on the update as an object, after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dager_tutorial.evaluation.parts import ATTENTION, EMBEDDINGS, HEAD, Part, parts_of_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update

UNCHANGED, CLIPPING, NOISE, ROUNDING, SHARING = "as sent", "clipping", "noise", "rounding", "sharing"
NOISE_LEVELS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)
"""Length of the noise over that of the update."""
NOISE_SEED = 1_618_033_988
"""No seed that the attack takes for its own draws: noise from one of those would be measured wrongly."""


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
        Change(CLIPPING, "clipped to a tenth of its norm", 0.1, partial(scaled, factor=0.1)),
        *_noises(update),
        Change(ROUNDING, "every number rounded to bfloat16", 16, partial(rounded, dtype=torch.bfloat16)),
        Change(ROUNDING, "every number rounded to float16", 16, partial(rounded, dtype=torch.float16)),
        Change(ROUNDING, "every number rounded to 8 bits (int8)", 8, quantised),
        *_fewer(parts_of_update(model, update), update),
    )


def scaled(update: Update, factor: float) -> Update:
    """The update with its norm clipped to a part of it: every number times one factor.

    Args:
        update: What the client sent.
        factor: The new norm over the old one.
    """
    return _each(update, lambda tensor: tensor * factor)


def noised(update: Update, level: float, seed: int = NOISE_SEED) -> Update:
    """The update with independent Gaussian noise on every number, of one deviation.

    Args:
        update: What the client sent.
        level: Length of the noise over the length of the update.
        seed: Seed of the noise.
    """
    deviation = level * length(update) / math.sqrt(size(update))
    draw = torch.Generator().manual_seed(seed)

    def add(tensor: Tensor) -> Tensor:
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return torch.randn(tensor.shape, generator=draw, dtype=wide).mul_(deviation).add_(tensor)

    return _each(update, add)


def rounded(update: Update, dtype: torch.dtype) -> Update:
    """The update with every number rounded to a narrower type.

    Args:
        update: What the client sent.
        dtype: The type.

    Raises:
        UpdateError: A number is larger than any of the type.
    """
    return _each(update, lambda tensor: tensor.to(dtype))


def quantised(update: Update, bits: int = 8) -> Update:
    """The update with every number rounded to the nearest of 2^bits - 1 steps, even from minus to plus the largest.

    Args:
        update: What the client sent.
        bits: Of one number.
    """
    steps = 2 ** (bits - 1) - 1

    def quantise(tensor: Tensor) -> Tensor:
        step = tensor.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny) / steps
        return (tensor.float() / step).round() * step

    return _each(update, quantise)


def restricted(update: Update, names: frozenset[str]) -> Update:
    """The update without some of its tensors.

    Args:
        update: What the client sent.
        names: Those that are still sent.

    Raises:
        UpdateError: None is left.
    """
    kept = {name: tensor for name, tensor in update.gradients.items() if name in names}
    return replace(update, gradients=kept)


def _noises(update: Update) -> Iterator[Change]:
    """Noise from hardly any to that of differential privacy, which is as large on every number as the whole update."""
    for level in NOISE_LEVELS:
        name = f"noise as long as {100 * level:g} % of the update"
        yield Change(NOISE, name, level, partial(noised, level=level))
    private = math.sqrt(size(update))
    name = "noise of differential privacy, multiplier 1 at this norm"
    yield Change(NOISE, name, private, partial(noised, level=private))


def _fewer(parts: dict[str, Part], update: Update) -> Iterator[Change]:
    """Smaller selections of an update's tensors, each where it leaves something out and something in."""
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
    total = size(update)
    seen = {frozenset(parts)}
    for name, keep in choices.items():
        names = frozenset(each for each, part in parts.items() if keep(part))
        if not names or names in seen:
            continue
        seen.add(names)
        share = sum(update.gradients[each].numel() for each in names) / total
        yield Change(SHARING, name, share, partial(restricted, names=names))


def _each(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    return replace(update, gradients={name: change(tensor) for name, tensor in update.gradients.items()})


def size(update: Update) -> int:
    """How many numbers an update has.

    Args:
        update: What the client sent.
    """
    return sum(tensor.numel() for tensor in update.gradients.values())


def length(update: Update) -> float:
    """The length of an update: the root of the sum of all squares.

    Args:
        update: What the client sent.
    """
    squares = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in update.gradients.values())
    return math.sqrt(sum(squares))
