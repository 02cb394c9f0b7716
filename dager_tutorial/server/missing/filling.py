"""Fill the missing entries of a gradient, which has a low rank: alternating least squares at a rank that grows.

Chapter `14_defences`.

A matrix of rank r is known from few more than r (outputs + inputs - r) of its entries. With one factor known the other
is a least-squares problem, row by row; so the two are solved for in turns. The rank is not known: it starts small, and
the strongest directions of what is left of the entries join until nothing is. Some entries are held out all the time;
what they say afterwards is the proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Filled:
    """The part of a gradient that could be filled.

    Attributes:
        values: float64, all its entries, with noise as large as the error at entries that were held out.
        outputs: int64, which outputs they are of.
        inputs: int64, which inputs.
    """

    values: Float[Tensor, "some chosen"]
    outputs: Int[Tensor, " some"]
    inputs: Int[Tensor, " chosen"]


def filled_span(found: Filled | None, inputs: int, read: Callable[[Tensor], Span | None]) -> Span | None:
    """The span of those inputs of a tap of which enough was sent.

    Args:
        found: The tap's gradient, as far as it could be filled.
        inputs: How many inputs the tap has.
        read: Reads a span off a gradient.
    """
    span = None if found is None else read(found.values)
    if found is None or span is None:
        return None
    chosen = torch.eye(inputs, dtype=torch.float64)[found.inputs.cpu()]
    return replace(span, projection=chosen.to(span.signal.device))


@dataclass
class _Factors:
    """A low-rank matrix on the way, as outputs x rank and rank x inputs."""

    left: Tensor
    right: Tensor
    fit: float
    rest: Tensor


def filled(gradient: Float[Tensor, "outputs inputs"], guess: int = 0) -> Filled | None:
    """Fill the missing entries of a gradient.

    Args:
        gradient: float64, zero where entries are missing.
        guess: About what rank it has, where something is known: with too few entries for it nothing is tried.

    Returns:
        The outputs and inputs of which enough was kept; None where that is too little to tell the rank, or where
        entries that were held out say otherwise.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> left, right = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((60, 3), (3, 50)))
        >>> kept = torch.rand(60, 50, generator=draw) < 0.4
        >>> found = filled(left @ right * kept)
        >>> float((found.values - (left @ right)[found.outputs][:, found.inputs]).abs().max()) < 1e-4
        True
    """
    outputs = _fullest(gradient != 0, gradient.shape[1])
    scaled, scales = _evened(gradient[outputs])
    known = scaled != 0
    draw = torch.Generator().manual_seed(constants().filling_seed)
    held = known & (torch.rand(known.shape, generator=draw) < constants().held_out).to(known.device)
    found = _grown(scaled, known & ~held, guess)
    if found is None:
        return None
    factors, enough = found
    rows, columns = enough.any(1), enough.any(0)
    tested = held & rows[:, None] & columns
    error = (factors.left @ factors.right - scaled)[tested].square().mean().sqrt()
    size = scaled[tested].square().mean().sqrt()
    if not int(tested.sum()) or error > constants().filling_error * size:
        return None
    values = (factors.left @ factors.right)[rows][:, columns]
    noise = error * torch.randn(values.shape, generator=draw, dtype=torch.float64).to(values.device)
    return Filled((values + noise) * scales[rows][:, columns], outputs[rows], columns.nonzero()[:, 0])


def _fullest(kept: Bool[Tensor, "outputs inputs"], most: int) -> Int[Tensor, " some"]:
    """Outputs of which something was kept, as many as there are inputs, those of which most was."""
    counts = kept.sum(1)
    order = counts.argsort(descending=True, stable=True)[:most]
    return order[counts[order] > 0].sort().values


def _evened(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix whose kept entries are of one size in every row and column, and what each was divided by."""
    scales = torch.ones_like(matrix)
    for direction in (1, 0):
        scaled = matrix / scales
        count = (scaled != 0).sum(direction, keepdim=True).clamp(min=1)
        size = (scaled.square().sum(direction, keepdim=True) / count).sqrt()
        scales = scales * torch.where(size > 0, size, 1.0)
    return matrix / scales, scales


def _enough(known: Tensor, rank: int) -> Tensor:
    """Known entries of rows and columns that hold enough of them for a rank."""
    least = constants().entries_a_direction * rank
    for _ in range(3):  # without thin columns rows may become thin
        known = known & (known.sum(1, keepdim=True) >= least)
        known = known & (known.sum(0, keepdim=True) >= least)
    return known


def _numbers(known: Tensor, rank: int) -> float:
    """How many entries there are for each number that a matrix of a rank on these rows and columns has."""
    rows, columns = int(known.any(1).sum()), int(known.any(0).sum())
    return int(known.sum()) / max(rank * (rows + columns - rank), 1)


def _grown(matrix: Tensor, known: Tensor, guess: int) -> tuple[_Factors, Tensor] | None:
    """Factors that fit known entries, and which rows and columns (as their known entries) they are of."""
    rank = 2
    right = torch.linalg.svd(matrix * known, full_matrices=False).Vh[:rank]
    while True:
        enough = _enough(known, max(rank, guess))
        if _numbers(enough, max(rank, guess)) < constants().entries_a_number:
            return None
        factors = _fitted(matrix, enough, right, pays=constants().filling_pays)
        smaller = _before_the_gap(factors)
        if smaller is not None:
            # With too many directions the last ones converge slowly; with just enough all of them fast.
            cut = _fitted(matrix, enough, smaller, pays=constants().polishing_pays)
            if cut.fit <= constants().filled:
                return cut, enough
        right = _wider(factors, max(2, rank // 5))
        rank = len(right)


def _before_the_gap(factors: _Factors) -> Tensor | None:
    """The directions before the widest gap in the upper half of those of a low-rank matrix; None where none is wide."""
    basis, corner = torch.linalg.qr(factors.right.T)
    _, values, rows = torch.linalg.svd(factors.left @ corner.T, full_matrices=False)
    ratios = values[:-1] / values[1:].clamp(min=1e-300)
    ratios[: (len(values) - 1) // 2] = 1.0
    cut = int(ratios.argmax()) + 1
    return (basis @ rows[:cut].T).T.contiguous() if ratios[cut - 1] >= constants().filling_gap else None


def _wider(factors: _Factors, more: int) -> Tensor:
    """Directions, and the strongest of what they leave."""
    _, values, rows = torch.linalg.svd(factors.rest, full_matrices=False)
    return torch.linalg.qr(torch.cat([factors.right, rows[:more] * values[0]]).T).Q.T.contiguous()


def _fitted(matrix: Tensor, known: Tensor, right: Tensor, *, pays: float) -> _Factors:
    """Both factors solved for in turns, as long as a round leaves no more than a share of what the last one left."""
    weight = known.to(matrix)
    size = float((matrix * weight).norm())
    before, most = torch.inf, constants().filling_rounds
    for _ in range(most):
        left = torch.linalg.qr(_solved(right, matrix, weight)).Q
        right = _solved(left.T, matrix.T, weight.T).T
        rest = (left @ right - matrix) * weight
        fit = float(rest.norm()) / size
        if fit > pays * before:
            break
        before, right = fit, torch.linalg.qr(right.T).Q.T
    left = _solved(right, matrix, weight)
    return _Factors(left, right, fit, rest)


def _solved(
    basis: Float[Tensor, "rank columns"], data: Float[Tensor, "rows columns"], weight: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows rank"]:
    """The coefficients of each row in a basis, by its known entries alone."""
    rank = len(basis)
    products = (basis[:, None] * basis[None]).flatten(0, 1)
    gram = (weight.contiguous() @ products.T).unflatten(1, (rank, rank))
    gram.diagonal(dim1=1, dim2=2).add_(
        constants().filling_ridge * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-300
    )
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(((data * weight) @ basis.T)[..., None], factor)[..., 0]
