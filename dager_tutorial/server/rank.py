"""How many directions of a gradient carry signal: the edge of the noise, gaps that noise does not make (chapter 2)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.constants import constants


def numerical_rank(singular_values: Float[Tensor, " inputs"], outputs: int, floor: float) -> int:
    """Count the singular values that noise cannot explain.

    Noise of equal variance has a largest singular value of sigma * (sqrt(outputs) + sqrt(inputs)) (the edge of
    random-matrix theory), with sigma taken from the values below the cut. The count is raised until the next value lies
    below that edge. Rounding noise is uneven, so that a few of its values pass, or, where its own spectrum falls
    steeply, most of them: where a clear gap stands just above the noise, or above what rounding makes at most, the cut
    is moved there.

    Args:
        singular_values: float64, falling.
        outputs: Number of rows of the matrix they belong to.
        floor: The least noise there can be, as a singular value: rounding of what was stored.

    Returns:
        The rank, from 0 to the number of inputs.

    Example:
        >>> numerical_rank(torch.tensor([5.0, 4.0, 1e-7, 1e-7], dtype=torch.float64), 6, 1e-8)
        2
    """
    values = singular_values.tolist()
    energies = singular_values.square().flip(0).cumsum(0).flip(0).tolist()
    rank = 0
    while rank < min(len(values), outputs) and values[rank] > noise_edge(energies, outputs, rank, floor):
        rank += 1
    edge = noise_edge(energies, outputs, rank, floor)
    for reach in (constants().clear_gap * edge, constants().largest_rounding * floor):
        ratio, cut = _widest_gap(values, rank, reach, floor)
        if ratio >= constants().clear_gap:
            return cut
    return rank


def noise_edge(energies: list[float], outputs: int, cut: int, floor: float) -> float:
    """The largest singular value of noise whose energy is what lies beyond a cut.

    Args:
        energies: For each cut the sum of the squared singular values from there on.
        outputs: Number of rows of the matrix.
        cut: How many directions are taken for signal.
        floor: The least noise there can be.
    """
    rows, columns = outputs - cut, len(energies) - cut
    if rows <= 0 or columns <= 0:
        return floor
    return max(floor, math.sqrt(energies[cut] / (rows * columns)) * (math.sqrt(rows) + math.sqrt(columns)))


def _widest_gap(values: list[float], rank: int, reach: float, floor: float) -> tuple[float, int]:
    """The largest ratio of neighbours of which the lower lies within reach of the noise, and the cut between them."""
    following = [*values[1:], floor]
    gaps = [
        (values[cut - 1] / max(following[cut - 1], 1e-300), cut)
        for cut in range(1, rank + 1)
        if following[cut - 1] <= reach
    ]
    return max(gaps, default=(0.0, rank))


def rounding_floor(gradient: Float[Tensor, "outputs inputs"], precision: float) -> float:
    """The largest singular value of the rounding errors that storing a gradient makes at least.

    Args:
        gradient: float64.
        precision: Machine epsilon of the stored type.
    """
    outputs, inputs = gradient.shape
    sigma = constants().storage_rounding * precision * gradient.norm().item() / math.sqrt(outputs * inputs)
    return sigma * (math.sqrt(outputs) + math.sqrt(inputs))


def right_singular(
    gradient: Float[Tensor, "outputs inputs"],
) -> tuple[Float[Tensor, " inputs"], Float[Tensor, "inputs inputs"]]:
    """Singular values, falling, and right singular vectors as columns, float64 like the gradient."""
    outputs, inputs = gradient.shape
    if outputs < inputs:
        gradient = torch.cat([gradient, gradient.new_zeros(inputs - outputs, inputs)])
    if outputs > inputs:
        gradient = torch.linalg.qr(gradient, mode="r").R
    _, values, rows = torch.linalg.svd(gradient)
    return values, rows.T.contiguous()
