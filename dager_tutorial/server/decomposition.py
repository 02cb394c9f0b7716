"""The signal of a gradient without a full decomposition: a few directions, three numbers about the rest.

Chapter `04_noise`.

Of the hundreds or thousands of singular vectors of a gradient the attack reads the first few, which hold the signal,
and of the noise behind them only how strong it is. A randomised range finder gets the former from a handful of
products: a random sketch finds the directions, one power step turns them until what is left of the noise in them is
smaller by the square of the gap, and the sketch grows until noise shows at its end. Where no clear gap stands behind
the signal, or the signal fills about half of the dimensions, the full decomposition is made instead.

Halko, Martinsson, Tropp, Finding Structure with Randomness, SIAM Review 2011 (arXiv 0909.4061), algorithm 4.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.rank import numerical_rank, right_singular, rounding_floor


class Tail(NamedTuple):
    """What is known of the singular values of the noise.

    Attributes:
        energy: The sum of their squares.
        fourth: The sum of their fourth powers.
        largest: The largest of them, 0 where there is none.
    """

    energy: float
    fourth: float
    largest: float


class Spectrum(NamedTuple):
    """All singular values and right singular vectors of a matrix.

    Attributes:
        values: float64, falling.
        directions: float64, as columns.
    """

    values: Float[Tensor, " inputs"]
    directions: Float[Tensor, "inputs inputs"]


class Signal(NamedTuple):
    """The signal of a matrix and its noise.

    Attributes:
        values: float64, the singular values of the signal, falling.
        directions: float64, its right singular vectors as columns.
        tail: What is known of the rest.
        complete: All singular values and vectors, where they were computed, else None.
        floor: The least noise there can be, as a singular value.
    """

    values: Float[Tensor, " rank"]
    directions: Float[Tensor, "inputs rank"]
    tail: Tail
    complete: Spectrum | None
    floor: float


def signal_of(matrix: Float[Tensor, "outputs inputs"], precision: float, *, guess: int = 0) -> Signal:
    """Find the signal of a gradient and measure its noise.

    Args:
        matrix: float64, its rows scaled to equal noise.
        precision: Machine epsilon of the stored type.
        guess: About how many directions the signal may have, where something is known.

    Returns:
        The same, to about a thousandth of the noise, whichever way it was computed.

    Example:
        >>> inputs = torch.randn(5, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> gradient = torch.randn(400, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ inputs
        >>> found = signal_of(gradient.float().double(), 2.0**-23)
        >>> len(found.values), found.complete is None
        (5, True)
    """
    return _sketched(matrix, precision, guess) or decomposed(matrix, precision)


def decomposed(matrix: Float[Tensor, "outputs inputs"], precision: float) -> Signal:
    """The same by the full decomposition.

    Args:
        matrix: See `signal_of`.
        precision: See `signal_of`.
    """
    values, directions = right_singular(matrix)
    floor = rounding_floor(matrix, precision)
    rank = numerical_rank(values, len(matrix), floor)
    return Signal(values[:rank], directions[:, :rank], tail_of(values[rank:]), Spectrum(values, directions), floor)


def tail_of(values: Float[Tensor, " noise"]) -> Tail:
    """The tail of known singular values, falling."""
    squares = values.square()
    return Tail(squares.sum().item(), squares.square().sum().item(), values[0].item() if len(values) else 0.0)


def _sketched(matrix: Tensor, precision: float, guess: int) -> Signal | None:
    """The signal by growing sketches; None where it does not stand clearly above its noise in a small one."""
    floor, spare = rounding_floor(matrix, precision), constants().oversampling
    size, most = max(constants().sketch, guess + guess // 4 + spare), min(matrix.shape) // 2
    # Noise below the rounding of float64 products cannot be measured behind a projection.
    while precision > 1e-12 and size <= most:
        values, directions = _leading(matrix, size)
        energy, fourth = _behind(matrix, directions)
        rank = numerical_rank(values, len(matrix), floor, inputs=matrix.shape[1], beyond=energy)
        if rank <= size - spare:
            behind = tail_of(values[rank:])
            tail = Tail(behind.energy + energy, behind.fourth + fourth, behind.largest)
            clear = not rank or values[rank - 1] >= constants().clear_gap * tail.largest
            return Signal(values[:rank], directions[:, :rank], tail, None, floor) if clear else None
        size = min(size * constants().growth + spare, most) if size < most else most + 1
    return None


def _leading(matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and right singular vectors, by a random sketch and one power step."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(len(matrix), size, generator=draw, dtype=torch.float64).to(matrix.device)
    basis = torch.linalg.qr(matrix.T @ mix).Q
    basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    _, values, rows = torch.linalg.svd(torch.linalg.qr(matrix @ basis, mode="r").R)
    return values, basis @ rows.T


def _behind(matrix: Tensor, directions: Tensor) -> tuple[float, float]:
    """Energy and fourth powers of what lies outside some directions, from random probes (Hutchinson)."""
    draw, count = torch.Generator().manual_seed(1), constants().noise_probes
    probes = torch.randn(matrix.shape[1], count, generator=draw, dtype=torch.float64).to(matrix.device)
    probes = probes - directions @ (directions.T @ probes)
    heard = matrix @ probes
    back = matrix.T @ heard
    back = back - directions @ (directions.T @ back)
    return heard.square().sum().item() / count, back.square().sum().item() / count
