"""A text as weights: which candidate stands at each position, found by one convex-like minimisation.

Chapter `08_encoder_recovery`.

For a known query, attention over a text is a ratio of two sums over positions, one term each. Replace the choice at
each position by weights on its candidates that add up to 1, and what attention gives stays such a ratio, now smooth
in the weights. A true text makes it lie in the span of the attention-output gradient, so that the part outside must
vanish: many equations, nearly linear in the weights. An interior-point method with Gauss-Newton steps solves them;
there is no random start and no penalty to tune, because the constraints alone (weights not negative, one token a
position) make the solution sparse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants


@dataclass(frozen=True)
class Relaxed:
    """Weights of the candidates.

    Attributes:
        weights: float64, from 0 to about 1.
        residual: Root of the squared equations that are left, in units of one candidate's contribution.
    """

    weights: Float[Tensor, " candidates"]
    residual: float


@dataclass(frozen=True)
class _System:
    """What the equations are made of; of the candidates, the settled ones come first, then those that are alive.

    Attributes:
        attention: queries x heads x candidates, float32 in the first iterations, then float64, as all that follows.
        outside:  heads x directions x candidates.
        turn: int64, the directions in turn, the first ones again behind the last.
        starts: For each query the first of these in which it is measured.
        count: How many directions it is measured in.
        constraints: float64, groups x variables, 1 where a variable (an alive candidate, or a slack) is of a group.
        settled: int64, indices of the settled candidates.
        alive: int64, indices of the alive ones.
    """

    attention: Tensor
    outside: Tensor
    turn: Tensor
    starts: tuple[int, ...]
    count: int
    constraints: Tensor
    settled: Tensor
    alive: Tensor


@dataclass(frozen=True)
class _Point:
    """Where the iterations stand: float64, one entry for each variable, all above 0."""

    weights: Tensor
    dual: Tensor

    def double(self) -> _Point:
        """The same in float64."""
        return _Point(self.weights.double(), self.dual.double())

    @property
    def barrier(self) -> float:
        """How far the point is from the boundary, on average."""
        return float((self.weights * self.dual).mean())


def relax(
    attention: Float[Tensor, "queries heads candidates"],
    outside: Float[Tensor, "heads candidates directions"],
    slots: Int[Tensor, " candidates"],
    optional: Bool[Tensor, " slots"],
    measured: int | None = None,
    budget: Budget | None = None,
) -> Relaxed:
    """Weights on candidates under which attention leaves the span as little as possible.

    Args:
        attention: float64, the exponentials of the scaled query-key products (any factor per query and head may be
            taken out).
        outside: float64, the parts outside the span of what each candidate's value contributes.
        slots: int64, the position's number, from 0, that each candidate competes for.
        optional: Where nothing may stand. A slot that is not optional and has one candidate is settled.
        measured: How many of the directions each query is measured in, one query after the other in turn; None for all.
        budget: Past its deadline the weights are returned as they are; None for the usual one.

    Returns:
        The weights; those of one slot add up to 1, or to at most 1 where it is optional.

    Example:
        >>> parts = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)  # one head
        >>> alike, slots = torch.ones(1, 1, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
        >>> [round(weight, 3) for weight in relax(alike, parts, slots, torch.tensor([False, False])).weights.tolist()]
        [1.0, 1.0, 0.0]
    """
    budget = budget or Budget()
    # The first iterations, with all candidates, cost most and need few digits; the last ones get all that there are.
    system, point = _posed(attention.float(), outside.float(), slots, optional, measured)
    scale, residual = None, 0.0
    for iteration in range(constants().iterations):
        if not len(system.alive):
            break
        jacobian, left = _linearised(system, point)
        scale = _scale(jacobian) if scale is None else scale
        rows, left = _with_constraints(system, point, jacobian, left, scale)
        residual = float(left.norm())
        if budget.late:
            break
        if _is_light(system) and min(residual, 1000 * point.barrier) < constants().light_residual:
            system, point, scale = _in_full(system, attention, outside), point.double(), scale.double()
            continue
        solved = residual < constants().solved or point.barrier < constants().spent
        after = None if solved else _stepped(point, rows, left)
        if after is None:
            break
        point = after
        if iteration >= constants().settling:
            system, point = _without_dead(system, point)
    return Relaxed(_all_weights(system, point.double(), len(slots)), residual)


def _posed(
    attention: Tensor, outside: Tensor, slots: Tensor, optional: Tensor, measured: int | None
) -> tuple[_System, _Point]:
    """The equations and the point to start from: all candidates of a slot, and its slack, weigh the same."""
    sizes = torch.bincount(slots, minlength=len(optional))
    is_settled = (sizes[slots] == 1) & ~optional[slots]
    settled, alive = is_settled.nonzero()[:, 0], (~is_settled).nonzero()[:, 0]
    order, directions = torch.cat([settled, alive]), outside.shape[2]
    # Each query is measured in the next `count` directions, after the last one from the first again.
    count = directions if measured is None else min(measured, directions)
    starts = tuple(query * count % directions for query in range(len(attention)))
    turn = torch.arange(max(starts) + count, device=slots.device) % directions
    slacks = (optional & (sizes > 0)).nonzero()[:, 0]
    constraints = _groups(torch.cat([slots[alive], slacks])).to(attention)
    tables = _tables(attention, outside, order, turn)
    system = _System(*tables, turn, starts, count, constraints, settled, alive)
    weights = (1.0 / constraints.sum(1, keepdim=True) * constraints).sum(0)
    return system, _Point(weights, torch.full_like(weights, 0.1))


def _is_light(system: _System) -> bool:
    return system.attention.dtype == torch.float32


def _in_full(system: _System, attention: Tensor, outside: Tensor) -> _System:
    """The same system in float64, from the tables it was posed with."""
    order = torch.cat([system.settled, system.alive])
    attention, outside = _tables(attention, outside, order, system.turn)
    return replace(system, attention=attention, outside=outside, constraints=system.constraints.double())


def _tables(attention: Tensor, outside: Tensor, order: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """What a system keeps of attention and contributions: candidates in their order, directions in turn."""
    return attention[:, :, order], outside[:, order].transpose(1, 2)[:, turn]


def _groups(slots: Tensor) -> Tensor:
    """Which variable competes for which slot (bool, slots that occur x variables)."""
    return slots.unique()[:, None] == slots


def _linearised(system: _System, point: _Point) -> tuple[Tensor, Tensor]:
    """Jacobian (queries x directions x candidates) and values (queries x directions) of the equations."""
    settled, alive = len(system.settled), len(system.alive)
    weights = torch.cat([point.weights.new_ones(settled), point.weights[:alive]])
    shares = system.attention / (system.attention @ weights)[..., None]
    measured = [system.outside[:, start : start + system.count] for start in system.starts]
    pairs = zip(measured, shares * weights, strict=True)
    per_head = torch.stack([(part @ each[..., None])[..., 0] for part, each in pairs])
    # The derivative of a ratio: each candidate's part, less its share of what there is.
    jacobian = -per_head.transpose(1, 2) @ shares
    for equations, part, share in zip(jacobian, measured, shares, strict=True):
        for head_part, head_share in zip(part, share, strict=True):
            equations.addcmul_(head_share, head_part)
    return jacobian, per_head.sum(1)


def _scale(jacobian: Tensor) -> Tensor:
    """Each query's root mean square contribution of a candidate (queries x 1)."""
    return jacobian.square().sum(1).mean(1).sqrt().clamp(min=1e-300)[:, None]


def _with_constraints(
    system: _System, point: _Point, jacobian: Tensor, left: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (equations x variables) and values of the scaled equations, constraints last; changes the Jacobian."""
    settled, alive = len(system.settled), len(system.alive)
    measures, weight = left.numel(), constants().constraint_weight
    rows = jacobian.new_zeros(measures + len(system.constraints), len(point.weights))
    rows[:measures, :alive] = jacobian.div_(scale[..., None])[:, :, settled:].flatten(0, 1)
    rows[measures:] = weight * system.constraints
    return rows, torch.cat([(left / scale).flatten(), weight * (system.constraints @ point.weights - 1)])


def _stepped(point: _Point, rows: Tensor, left: Tensor) -> _Point | None:
    """One predictor-corrector step towards smaller equations at a falling barrier (Mehrotra).

    None where rounding leaves no step to take.
    """
    weights, dual = point.weights, point.dual
    ratio = weights / dual
    scaled_rows = rows * ratio.sqrt()
    system = scaled_rows @ scaled_rows.T
    system.diagonal().add_(1)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        return None

    def newton(target: Tensor) -> Tensor:
        scaled = ratio * target
        return scaled - ratio * (rows.T @ torch.cholesky_solve((rows @ scaled)[:, None], factor)[:, 0])

    downhill = -(rows.T @ left)
    ahead = newton(downhill)
    ahead_dual = -dual - dual * ahead / weights
    reached = (weights + _longest(weights, ahead) * ahead) * (dual + _longest(dual, ahead_dual) * ahead_dual)
    centre = (reached.mean() / point.barrier) ** 3 * point.barrier - ahead * ahead_dual
    change = newton(downhill + centre / weights)
    change_dual = (centre - dual * change) / weights - dual
    length = 0.98 * min(_longest(weights, change), _longest(dual, change_dual))
    return _Point(weights + length * change, dual + length * change_dual)


def _longest(values: Tensor, change: Tensor) -> float:
    """The longest step, at most 1, that leaves positive values positive."""
    falling = change < 0
    return min(1.0, float((-values[falling] / change[falling]).min())) if bool(falling.any()) else 1.0


def _without_dead(system: _System, point: _Point) -> tuple[_System, _Point]:
    """Take candidates and slacks without weight out of all tables, where they are many enough to be worth a copy."""
    keep = point.weights > constants().dead_weight
    if keep.sum() > 0.8 * len(keep):
        return system, point
    alive = keep[: len(system.alive)]
    columns = torch.cat([torch.ones_like(system.settled, dtype=torch.bool), alive])
    smaller = replace(
        system,
        attention=system.attention[..., columns],
        outside=system.outside[..., columns],
        constraints=system.constraints[:, keep],
        alive=system.alive[alive],
    )
    return smaller, _Point(point.weights[keep], point.dual[keep])


def _all_weights(system: _System, point: _Point, candidates: int) -> Tensor:
    """Weights of all candidates, those that were dropped at 0."""
    weights = point.weights.new_zeros(candidates)
    weights[system.settled] = 1
    weights[system.alive] = point.weights[: len(system.alive)]
    return weights
