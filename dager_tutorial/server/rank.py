"""How many directions of a gradient carry signal: the edge of the noise, gaps that noise does not make.

Chapter `04_noise`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.constants import constants


def numerical_rank(
    singular_values: Float[Tensor, " known"],
    outputs: int,
    floor: float,
    *,
    inputs: int | None = None,
    beyond: float = 0.0,
) -> int:
    """Count the singular values that noise cannot explain.

    Noise of equal variance has a largest singular value of sigma * (sqrt(outputs) + sqrt(inputs)) (the edge of
    random-matrix theory), with sigma taken from the values below the cut. The count is raised until the next value lies
    below that edge. Rounding noise is uneven, so that a few of its values pass, or, where its own spectrum falls
    steeply, most of them: where a clear gap stands just above the noise, or above what rounding makes at most, the cut
    is moved there.

    Args:
        singular_values: float64, falling: all, or the first ones.
        outputs: Number of rows of the matrix they belong to.
        floor: The least noise there can be, as a singular value: rounding of what was stored.
        inputs: Number of columns of the matrix, where not all singular values are known.
        beyond: The sum of the squares of those that are not.

    Returns:
        The rank, from 0 to the number of singular values that are known.

    Example:
        >>> numerical_rank(torch.tensor([5.0, 4.0, *[1e-7] * 30], dtype=torch.float64), 60, 1e-8)
        2
    """
    values, inputs = singular_values.tolist(), inputs or len(singular_values)
    energies = (singular_values.square().flip(0).cumsum(0).flip(0) + beyond).tolist()
    rank = 0
    while rank < min(len(values), outputs) and values[rank] > noise_edge(
        energies[rank], outputs - rank, inputs - rank, floor
    ):
        rank += 1
    left = energies[rank] if rank < len(values) else beyond
    edge = noise_edge(left, outputs - rank, inputs - rank, floor)
    for reach in (constants().clear_gap * edge, constants().largest_rounding * floor):
        ratio, cut = _widest_gap(values, rank, reach, floor if len(values) == inputs else math.inf)
        if ratio >= constants().clear_gap:
            return cut
    return rank


def noise_edge(energy: float, rows: int, columns: int, floor: float) -> float:
    """The largest singular value of a matrix of noise.

    Args:
        energy: The sum of the squares of its entries.
        rows: Number of its rows, less the directions taken for signal.
        columns: Number of its columns, likewise.
        floor: The least noise there can be.
    """
    if rows <= 0 or columns <= 0:
        return floor
    return max(floor, math.sqrt(energy / (rows * columns)) * (math.sqrt(rows) + math.sqrt(columns)))


def _widest_gap(values: list[float], rank: int, reach: float, last: float) -> tuple[float, int]:
    """The largest ratio of neighbours of which the lower lies within reach of the noise, and the cut between them.

    What follows the last value is `last`: the least noise there can be, or infinite where it is not known.
    """
    following = [*values[1:], last]
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
