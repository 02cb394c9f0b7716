"""A text as weights: which candidate stands at each position, found by one convex-like minimisation.

For a known query, attention over a text is a ratio of two sums over positions, one term each. Replace the choice at
each position by weights on its candidates that add up to 1, and what attention gives stays such a ratio, now smooth
in the weights. A true text makes it lie in the span of the attention-output gradient, so that the part outside must
vanish: many equations, nearly linear in the weights. An interior-point method with Gauss-Newton steps solves them;
there is no random start and no penalty to tune, because the constraints alone (weights not negative, one token a
position) make the solution sparse. Chapter 5 watches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 40
# The equations are solved to rounding.
SOLVED = 3e-6
# The barrier at which no digits are left to gain.
SPENT = 1e-13
# Weight of the constraints' rows against those of the equations, which are scaled to mean square 1 per candidate.
CONSTRAINT = 3.0
# Candidates below this weight are dropped once the first rounds have settled.
DEAD = 2e-4
SETTLED = 4


@dataclass(frozen=True)
class Relaxed:
    """Weights of the candidates.

    Attributes:
        weights: float64, candidates, from 0 to about 1.
        residual: Root of the squared equations that are left, in units of one candidate's contribution.
    """

    weights: Tensor
    residual: float


def relax(attention: Tensor, outside: Tensor, slots: Tensor, optional: Tensor, measured: int | None = None) -> Relaxed:
    """Weights on candidates under which attention leaves the span as little as possible.

    Args:
        attention: float64, queries x heads x candidates, the exponentials of the scaled query-key products (any
            factor per query and head may be taken out).
        outside: float64, heads x candidates x directions: the parts outside the span of what each candidate's value
            contributes.
        slots: int64, candidates: the position's number, from 0, that each competes for.
        optional: bool, slots: where nothing may stand. A slot that is not optional and has one candidate is settled.
        measured: How many of the directions each query is measured in, one query after the other in turn; None for all.

    Returns:
        The weights; those of one slot add up to 1, or to at most 1 where it is optional.
    """
    return _InteriorPoint(attention, outside, slots, optional, measured).run()


class _InteriorPoint:
    """Primal-dual iterations; variables are the open candidates' weights and one slack for each optional slot."""

    def __init__(
        self, attention: Tensor, outside: Tensor, slots: Tensor, optional: Tensor, measured: int | None
    ) -> None:
        sizes = torch.bincount(slots, minlength=len(optional))
        settled = (sizes[slots] == 1) & ~optional[slots]
        self.settled, self.open = settled.nonzero()[:, 0], (~settled).nonzero()[:, 0]
        self.candidates = torch.cat([self.settled, self.open])
        # Each query is measured in the next `count` directions, after the last one from the first again.
        self.count = outside.shape[2] if measured is None else min(measured, outside.shape[2])
        self.starts = [query * self.count % outside.shape[2] for query in range(len(attention))]
        turn = torch.arange(outside.shape[2] + self.count, device=slots.device) % outside.shape[2]
        # heads x directions x candidates: the settled ones first, then those that are alive.
        self.outside = outside[:, self.candidates].transpose(1, 2)[:, turn[: max(self.starts) + self.count]]
        self.attention = attention[:, :, self.candidates]
        slacks = (optional & (sizes > 0)).nonzero()[:, 0]
        groups = torch.cat([slots[self.open], slacks]).unique(return_inverse=True)[1]
        self.constraints = attention.new_zeros(int(groups.max()) + 1 if len(groups) else 0, len(groups))
        self.constraints[groups, torch.arange(len(groups), device=slots.device)] = 1
        self.weights = 1.0 / self.constraints.sum(1)[groups]
        self.dual = torch.full_like(self.weights, 0.1)
        self.scale: Tensor | None = None

    def run(self) -> Relaxed:
        residual = 0.0
        total = len(self.candidates)
        for step in range(ROUNDS):
            if not len(self.open):
                break
            rows, left = self._equations()
            residual = float(left.norm())
            if residual < SOLVED or float((self.weights * self.dual).mean()) < SPENT or not self._step(rows, left):
                break
            if step >= SETTLED:
                self._drop_dead()
        weights = self.weights.new_zeros(total)
        weights[self.settled] = 1
        weights[self.open] = self.weights[: len(self.open)]
        return Relaxed(weights, residual)

    def _equations(self) -> tuple[Tensor, Tensor]:
        """Jacobian (equations x variables) and residuals of the equations, constraints last."""
        known, count = len(self.settled), len(self.open)
        weights = torch.cat([self.weights.new_ones(known), self.weights[:count]])
        shares = self.attention / (self.attention @ weights)[..., None]
        measured = [self.outside[:, start : start + self.count] for start in self.starts]
        per_head = torch.stack([part @ each[..., None] for part, each in zip(measured, shares * weights, strict=True)])
        # The derivative of a ratio: each candidate's part, less its share of what there is.
        jacobian = -per_head[..., 0].transpose(1, 2) @ shares
        for equations, part, share in zip(jacobian, measured, shares, strict=True):
            for head_part, head_share in zip(part, share, strict=True):
                equations.addcmul_(head_share, head_part)
        left = per_head[..., 0].sum(1)
        if self.scale is None:
            self.scale = jacobian.square().sum(1).mean(1).sqrt().clamp(min=1e-300)[:, None]
        measures = len(jacobian) * self.count
        rows = jacobian.new_zeros(measures + len(self.constraints), len(self.weights))
        rows[:measures, :count] = jacobian.div_(self.scale[..., None])[:, :, known:].flatten(0, 1)
        rows[measures:] = CONSTRAINT * self.constraints
        return rows, torch.cat([(left / self.scale).flatten(), CONSTRAINT * (self.constraints @ self.weights - 1)])

    def _step(self, rows: Tensor, left: Tensor) -> bool:
        """One predictor-corrector step towards smaller equations at a falling barrier (Mehrotra).

        False where rounding leaves no step to take.
        """
        weights, dual = self.weights, self.dual
        ratio = weights / dual
        scaled_rows = rows * ratio.sqrt()
        system = scaled_rows @ scaled_rows.T
        system.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            return False

        def newton(target: Tensor) -> Tensor:
            scaled = ratio * target
            return scaled - ratio * (rows.T @ torch.cholesky_solve((rows @ scaled)[:, None], factor)[:, 0])

        downhill = -(rows.T @ left)
        barrier = (weights * dual).mean()
        ahead = newton(downhill)
        ahead_dual = -dual - dual * ahead / weights
        reached = (weights + _longest(weights, ahead) * ahead) * (dual + _longest(dual, ahead_dual) * ahead_dual)
        centre = (reached.mean() / barrier) ** 3 * barrier - ahead * ahead_dual
        change = newton(downhill + centre / weights)
        change_dual = (centre - dual * change) / weights - dual
        length = 0.98 * min(_longest(weights, change), _longest(dual, change_dual))
        self.weights, self.dual = weights + length * change, dual + length * change_dual
        return True

    def _drop_dead(self) -> None:
        """Take candidates (and slacks) without weight out of all tables."""
        keep = self.weights > DEAD
        if keep.sum() > 0.8 * len(keep):
            return
        alive = keep[: len(self.open)]
        columns = torch.cat([torch.ones_like(self.settled, dtype=torch.bool), alive])
        self.open, self.attention, self.outside = (
            self.open[alive],
            self.attention[..., columns],
            self.outside[..., columns],
        )
        self.weights, self.dual, self.constraints = self.weights[keep], self.dual[keep], self.constraints[:, keep]


def _longest(values: Tensor, change: Tensor) -> float:
    """The longest step, at most 1, that leaves positive values positive."""
    falling = change < 0
    return min(1.0, float((-values[falling] / change[falling]).min())) if bool(falling.any()) else 1.0
