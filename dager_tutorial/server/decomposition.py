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

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.rank import numerical_rank, right_singular, rounding_floor

# Seeds that nobody else takes: a client that draws its noise from the seed of the probes would be measured wrongly.
SKETCH_SEED, PROBE_SEED = 2_718_281_828, 3_141_592_653


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
    floor = rounding_floor(matrix, precision)
    if 2 * len(matrix) <= matrix.shape[1]:
        return _of_few_outputs(matrix, floor)
    values, directions = right_singular(matrix)
    rank = numerical_rank(values, len(matrix), floor)
    return Signal(values[:rank], directions[:, :rank], tail_of(values[rank:]), Spectrum(values, directions), floor)


def _of_few_outputs(matrix: Tensor, floor: float) -> Signal:
    """The same where inputs are many more than outputs: there is nothing to find in most directions."""
    basis, corner = torch.linalg.qr(matrix.T)
    turned, values, _ = torch.linalg.svd(corner)
    rank = numerical_rank(values, len(matrix), floor, inputs=matrix.shape[1])
    return Signal(values[:rank], (basis @ turned)[:, :rank], tail_of(values[rank:]), None, floor)


def tail_of(values: Float[Tensor, " noise"]) -> Tail:
    """The tail of known singular values, falling."""
    squares = values.square()
    return Tail(squares.sum().item(), squares.square().sum().item(), values[0].item() if len(values) else 0.0)


def _sketched(matrix: Tensor, precision: float, guess: int) -> Signal | None:
    """The signal by a growing sketch; None where it does not stand clearly above its noise in one that pays."""
    floor, spare = rounding_floor(matrix, precision), constants().oversampling
    size = max(constants().sketch, guess + guess // 4 + spare)
    most = int(constants().largest_sketch * min(matrix.shape))
    draw, light = torch.Generator().manual_seed(SKETCH_SEED), matrix.float()
    mixtures, spanned = matrix.new_empty(matrix.shape[1], 0), matrix.new_empty(0, matrix.shape[1])
    # Noise below the rounding of float64 products cannot be measured behind a projection.
    weakest = math.inf
    while precision > 1e-12 and size <= most:
        fresh = _mixed(light, mixtures, size - len(spanned), draw)
        mixtures = torch.cat([mixtures, fresh], 1)
        spanned = torch.cat([spanned, _powered(matrix, light, fresh)])
        basis = torch.linalg.qr(spanned.T).Q
        before, weakest = weakest, _weakest_at_its_end(matrix, basis)
        # To look at its end is cheap. Noise far above rounding is told from signal by not falling from size to size.
        if weakest <= constants().largest_rounding * floor or weakest >= before / 2:
            found = _taken_apart(matrix, basis, floor)
            if len(found.values) <= size - spare:
                clear = not len(found.values) or found.values[-1] >= constants().clear_gap * found.tail.largest
                return found if clear else None
        size = min(size * constants().growth, most) if size < most else most + 1
    return None


def _mixed(light: Tensor, before: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Random mixtures of a matrix's rows, orthonormal to each other and to those before, as columns (float64).

    Orthogonal to those before, or the weakest direction would stand in them as the square of its strength beside the
    strongest, and drown in rounding after the power step.
    """
    fresh = (torch.randn(count, len(light), generator=draw).to(light.device) @ light).T.double()
    for _ in range(2):  # once leaves what rounding makes of the strongest
        fresh = fresh - before @ (before.T @ fresh)
    return torch.linalg.qr(fresh).Q


def _powered(matrix: Tensor, light: Tensor, mixtures: Tensor) -> Tensor:
    """More rows of the sketch: mixtures after one power step.

    The first product may be rounded to float32: what is wrong with it is filtered by the second, as noise is. A few
    rows times a matrix is several times faster than the matrix times a few columns.
    """
    return (mixtures.T.float() @ light.T).double() @ matrix


def _weakest_at_its_end(matrix: Tensor, basis: Tensor) -> float:
    """How strong the matrix is in the weakest of the last directions of a sketch."""
    last = basis[:, -constants().oversampling :].T @ matrix.T
    return torch.linalg.vector_norm(last, dim=1).min().item()


def _taken_apart(matrix: Tensor, basis: Tensor, floor: float) -> Signal:
    """The signal within a sketch, and the noise there and outside."""
    heard = basis.T @ matrix.T
    _, values, rows = torch.linalg.svd(torch.linalg.qr(heard.T, mode="r").R)
    directions = basis @ rows.T
    energy, fourth, mixed = _behind(matrix, directions)
    rank = numerical_rank(values, len(matrix), floor, inputs=matrix.shape[1], beyond=energy)
    behind = tail_of(values[rank:])
    # Noise within the sketch and noise outside are not orthogonal to each other: their product counts twice.
    fourth += behind.fourth + 2 * mixed[rank:].sum().item()
    tail = Tail(behind.energy + energy, fourth, behind.largest)
    return Signal(values[:rank], directions[:, :rank], tail, None, floor)


def _behind(matrix: Tensor, directions: Tensor) -> tuple[float, float, Float[Tensor, " directions"]]:
    """What lies outside some directions, from random probes (Hutchinson).

    Returns:
        Its energy; its fourth powers; and the square of its product with each of the directions.
    """
    draw, count = torch.Generator().manual_seed(PROBE_SEED), constants().noise_probes
    probes = torch.randn(count, matrix.shape[1], generator=draw, dtype=torch.float64).to(matrix.device)
    probes = probes - (probes @ directions) @ directions.T
    heard = probes @ matrix.T
    back = heard @ matrix
    inside = back @ directions
    back = back - inside @ directions.T
    return heard.square().sum().item() / count, back.square().sum().item() / count, inside.square().sum(0) / count
