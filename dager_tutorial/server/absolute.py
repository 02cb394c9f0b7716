"""Least absolute deviations: the combination of a basis that passes exactly through most of a vector's coordinates.

Chapter `14_defences`.

Where most coordinates agree and some are wrong by any amount, squares would share the error among all of them; absolute
values leave it where it is. It is how a mask of dropout is read.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.constants import constants


def absolute_residual(
    target: Float[Tensor, " coordinates"],
    basis: Float[Tensor, "coordinates directions"],
    costs: Float[Tensor, " coordinates"] | None = None,
) -> Float[Tensor, " coordinates"]:
    """What the combination with the least absolute deviations leaves of a vector.

    Squares, reweighted by what the last round left, come to it.

    Args:
        target: float64.
        basis: float64.
        costs: float64, how much each coordinate's deviation counts; all alike by default.

    Example:
        >>> line = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> (absolute_residual(2 * line + 5 * (line == 3), line[:, None]).abs() > 1e-3).nonzero().tolist()
        [[2]]
    """
    size = target.abs().mean()
    costs = torch.ones_like(target) if costs is None else costs
    weights, left = costs, target
    for step in range(constants().absolute_rounds):
        scaled = basis * weights[:, None]
        gram = scaled.T @ basis
        gram.diagonal().add_(1e-12 * gram.diagonal().mean())
        left = target - basis @ torch.linalg.solve(gram, scaled.T @ target)
        weights = costs / (left.abs() + max(1e-8, 0.1 * 0.6**step) * size)
    return left
