"""Gradients on a grid: a client that sends few bits rounds every entry to a multiple of a step, one for each tensor.

Chapter `14_defences`.

Between truth and grid lies at most a step, half of one where it is rounded to nearest: the noise is known, and what
simulated texts leave can be compared with it entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.tap import KINDS, precise
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decomposition import Spectrum, Tail
from dager_tutorial.server.rank import right_singular
from dager_tutorial.server.subspace import Span


def bits_of(adapter: Adapter, gradients: Mapping[str, Tensor]) -> int | None:
    """With how many bits a client sent each entry, by the gradients of block 0's maps; None where they are on no grid.

    Args:
        adapter: The architecture.
        gradients: Gradients by backbone parameter name.
    """
    taps = (adapter.tap(0, kind) for kind in KINDS)
    found = [gradients[name] for tap in taps for name in tap.parameters if name in gradients]
    if not found or any(torch.finfo(each.dtype).bits < 32 for each in found):
        return None
    grids = (bits for bits in range(2, constants().most_bits + 1) if all(_on_grid(each, bits) for each in found))
    return next(grids, None)


def step_of(gradient: Tensor, bits: int) -> float:
    """The step of a grid whose largest level the largest entry is.

    Args:
        gradient: Any.
        bits: How many bits a level has, its sign included.

    >>> step_of(torch.tensor([-3.0, 0.0, 14.0]), 4)
    2.0
    """
    return float(gradient.abs().max()) / (2 ** (bits - 1) - 1)


def grid_deviation(gradient: Tensor, bits: int) -> float:
    """The deviation of an entry from the nearest level; infinite where a gradient has none, of which nothing is known.

    Args:
        gradient: On a grid.
        bits: How many bits an entry was sent with.
    """
    return step_of(gradient, bits) / math.sqrt(12) or math.inf


def in_steps(gradient: Tensor, bits: int) -> Tensor:
    """A gradient in units of its step: all of its entries have the same noise then.

    Args:
        gradient: Any.
        bits: How many bits an entry was sent with.
    """
    return precise(gradient) / max(step_of(gradient, bits), 1e-300)


def grid_span(
    levels: Float[Tensor, "outputs inputs"], *, arithmetic: float = 0.0, device: torch.device | None = None
) -> Span | None:
    """Read the span of a layer's inputs off a gradient on a grid.

    The variance of rounding a number to a whole one by chance is 1/6, to the nearest 1/12 (what is measured may be
    less where most entries became zero). What that makes of a singular value is known.

    Args:
        levels: float64, the gradient in units of its step.
        arithmetic: Relative rounding error of the vectors that will be tested.
        device: Where vectors will be tested; None for the gradient's own device.

    Returns:
        The span, or None where the gradient is zero.
    """
    levels = levels[levels.any(1)]
    if not len(levels):
        return None
    values, directions = right_singular(levels)
    outputs, inputs = levels.shape
    variance = 1 / 6
    for _ in range(3):
        largest = math.sqrt(variance) * (math.sqrt(outputs) + math.sqrt(inputs))
        rank = int((values > largest).sum())
        free = max(inputs - rank, 1)
        measured = float(values[rank:].square().sum()) / (free * max(outputs - rank, 1))
        variance = min(max(measured, 1 / 12), 1 / 6)
    energy = max(outputs - rank, 1) * free * variance
    tail = Tail(energy, energy**2 / free, largest)
    arithmetic = math.hypot(arithmetic, constants().projection_error)
    known = Spectrum(values, directions)
    return Span(directions[:, :rank], values[:rank], tail, outputs, arithmetic, device, known=known)


def _on_grid(gradient: Tensor, bits: int) -> bool:
    """Whether all entries are multiples of the step."""
    step = max(step_of(gradient, bits), 1e-300)
    parts = (precise(part) / step for part in gradient.flatten().split(2**16))  # the first tells, where there is none
    return bool(gradient.any()) and all(
        bool((each - each.round()).abs().max() < constants().off_grid) for each in parts
    )


def beyond_rounding(rest: Mapping[str, Tensor], received: Mapping[str, Tensor], bits: int) -> float:
    """The norm of what rounding to a grid does not explain.

    Where everything is rounded to nearest nothing lies further than half a step away. Where it is rounded at random,
    up with the share of the step that is missing, the sum of squares is known to a few parts in ten thousand.

    Args:
        rest: What is left of the update, by its names.
        received: The update.
        bits: How many bits an entry was sent with.
    """
    far, excess, variance = 0.0, 0.0, 0.0
    for name, each in rest.items():
        step = max(step_of(received[name], bits), 1e-300)
        left = precise(each) / step
        far += step**2 * float((left.abs() - 0.5 - constants().off_grid).clamp(min=0).square().sum())
        more, spread = _excess(left, received[name].to(left) / step - left)
        excess, variance = excess + step**2 * more, variance + step**4 * spread
    if abs(excess) <= constants().rounding_deviations * math.sqrt(variance):
        return 0.0
    return math.sqrt(min(far, abs(excess)) if far == 0.0 else max(far, abs(excess)))


def _excess(left: Float[Tensor, "*shape"], simulated: Float[Tensor, "*shape"]) -> tuple[float, float]:
    """By how much a sum of squares exceeds that of rounding at random, and that sum's variance, in steps."""
    up = simulated - simulated.floor()
    down = 1 - up
    variance = up * down * (up**3 + down**3 - up * down)
    return float((left.square() - up * down).sum()), float(variance.sum())
