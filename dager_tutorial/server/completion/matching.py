"""Which tokens a row of a token-level loss was asked for, and how often each.

The gradient of the last MLP's output map is `M = sum_i a_i^T u_i` over distinct rows. The inputs a_i are known, so
least squares gives every u_i while there are fewer rows than the map has inputs; and `u_i = sum_t c_i(t) phi_i(t) / N`
gives the counts: those of tokens that must be there first, then, while something is left, the token of the vocabulary
that points most along it. As many equations as the model is wide stand against each guess: what fits is right.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.completion.output_rows import OutputRows
from dager_tutorial.server.constants import constants


@dataclass(frozen=True)
class RowGradients:
    """The gradients at the map's output.

    Attributes:
        values: float64.
        errors: float64, how long the error of each is expected to be.
    """

    values: Float[Tensor, "rows width"]
    errors: Float[Tensor, " rows"]


def row_gradients(inputs: Float[Tensor, "rows inner"], gradient: Float[Tensor, "inner width"]) -> RowGradients:
    """Solve `gradient = inputs^T values` for the values; what does not fit tells how large their errors are.

    Args:
        inputs: float64, fewer rows than columns.
        gradient: float64.

    Example:
        >>> found = row_gradients(torch.eye(2, 4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64))
        >>> found.values.tolist(), found.errors.tolist()
        ([[1.0], [1.0]], [1.0, 1.0])
    """
    sizes = inputs.norm(dim=1, keepdim=True).clamp(min=1e-300)
    basis, triangle = torch.linalg.qr((inputs / sizes).T)
    triangle = triangle + torch.diag(1e-14 * (triangle.diagonal().abs() < 1e-14))  # dependent rows: huge errors
    inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(sizes), dtype=inputs.dtype), upper=True) / sizes
    inside = basis.T @ gradient
    noise = (gradient - basis @ inside).norm() / max(1, len(gradient) - len(sizes)) ** 0.5
    return RowGradients(inverse @ inside, noise * inverse.norm(dim=1))


@dataclass(frozen=True)
class Fit:
    """What tokens a row's gradient is made of.

    Attributes:
        tokens: Each once.
        slopes: float64, the gradient that each token would leave if it were the only target.
        shares: float64, of each token its count over the number of all targets.
        rest: float64, what of the gradient they leave.
    """

    tokens: tuple[int, ...]
    slopes: Float[Tensor, "tokens width"]
    shares: Float[Tensor, " tokens"]
    rest: Float[Tensor, " width"]


def _fit(tokens: tuple[int, ...], slopes: Tensor, goal: Tensor) -> Fit:
    """Least squares."""
    if not tokens:
        return Fit(tokens, slopes, goal.new_zeros(0), goal)
    shares = torch.linalg.lstsq(slopes.T, goal[:, None]).solution[:, 0]
    return Fit(tokens, slopes, shares, goal - shares @ slopes)


@dataclass(frozen=True)
class _Whole:
    """Whole counts of a row's targets, whether they leave no doubt, and what gradient they make."""

    counts: dict[int, int]
    clear: bool
    gradient: Tensor


@dataclass(frozen=True)
class _Round:
    """One look at some of the rows.

    Attributes:
        rows: All rows.
        looked: int64, those that are looked at.
        goals: float64, their gradients.
        noise: float64, what solving may leave of each.
        scales: float64, what rounding leaves of one target in units of epsilon: probabilities near one cancel.
        rounding: How many units of epsilon are left.
        least: float64, the slope of each row's likeliest token: of all targets it leaves the least.
    """

    rows: OutputRows
    looked: Tensor
    goals: Float[Tensor, "looked width"]
    noise: Float[Tensor, " looked"]
    scales: Float[Tensor, " looked"]
    rounding: float
    least: Float[Tensor, " looked"]

    @classmethod
    def of(cls, rows: OutputRows, left: list[int], gradient: Tensor, precision: float) -> _Round:
        """Solve for the gradients of the rows that are left."""
        looked = torch.tensor(left)
        found = row_gradients(rows.inputs[looked], gradient)
        # transformers computes Llama's norms and the causal loss in float32 whatever the client's dtype is.
        rounding = constants().target_rounding * max(precision, torch.finfo(torch.float32).eps)
        noise = constants().target_noise * found.errors
        least, scales = (
            rows.slopes(looked, rows.likely[looked]).norm(dim=1),
            rows.pulled(rows.means)[looked].norm(dim=1),
        )
        return cls(rows, looked, found.values, noise, scales, rounding, least)

    def tolerance(self, index: int, fit: Fit) -> float:
        """What a true fit to a row may leave."""
        size = self.goals[index].norm() + fit.shares.sum().abs() * self.scales[index]
        return float(self.noise[index] + self.rounding * size)

    def fits(self, known: Sequence[Sequence[int]]) -> list[Fit]:
        """Fit the tokens that are known, then add others while something is left and a token explains some of it."""
        fits = self._extended([tuple(known[row]) for row in self.looked.tolist()])
        growing = self._growing(range(len(fits)), fits)
        for _ in range(constants().most_endings):
            if not growing:
                break
            found = self._next(growing, [fits[index].rest for index in growing])
            more = {
                index: token for index, token in zip(growing, found, strict=True) if token not in fits[index].tokens
            }
            wider = self._extended([(*fits[index].tokens, token) for index, token in more.items()], list(more))
            better = dict(zip(more, wider, strict=True))
            growing = self._growing(better, [better.get(index, fit) for index, fit in enumerate(fits)])
            fits = [better.get(index, fit) for index, fit in enumerate(fits)]
        return fits

    def _growing(self, among: Iterable[int], fits: Sequence[Fit]) -> list[int]:
        """Those of some rows that leave more than they may."""
        return [index for index in among if fits[index].rest.norm() > self.tolerance(index, fits[index])]

    def _extended(self, tokens: list[tuple[int, ...]], among: Sequence[int] | None = None) -> list[Fit]:
        """Fits of given tokens to some of the rows, to all where none are named."""
        among = range(len(tokens)) if among is None else among
        rows = [int(self.looked[index]) for index, some in zip(among, tokens, strict=True) for _ in some]
        slopes = self.rows.slopes(torch.tensor(rows, dtype=torch.long), torch.tensor(sum(tokens, ()), dtype=torch.long))
        parts = slopes.split([len(some) for some in tokens])
        return [_fit(some, part, self.goals[index]) for index, some, part in zip(among, tokens, parts, strict=True)]

    def _next(self, among: list[int], rests: list[Tensor]) -> list[int]:
        """For some rows the token that explains most of what is left."""
        rows, left = self.looked[among], torch.stack(rests)
        tokens = self.rows.likeliest(rows, left, constants().endings_tried)
        slopes = self.rows.slopes(rows.repeat_interleave(tokens.shape[1]), tokens.flatten()).unflatten(0, tokens.shape)
        gains = (slopes * left[:, None]).sum(-1) / slopes.norm(dim=-1).clamp(min=1e-300)
        return tokens[torch.arange(len(tokens)), gains.argmax(1)].tolist()

    def certain_shares(self, fits: Sequence[Fit]) -> Tensor:
        """The shares of tokens in rows that are explained, far from zero."""
        certain = [torch.zeros(0, dtype=torch.float64)]
        for index, fit in enumerate(fits):
            tolerance = self.tolerance(index, fit)
            if fit.rest.norm() <= tolerance:
                certain.append(fit.shares[fit.shares * fit.slopes.norm(dim=1) > 10 * tolerance])
        return torch.cat(certain)

    def whole(self, index: int, fit: Fit, predicted: float) -> _Whole:
        """Round the shares of a row: clear where the whole numbers fit and a target more or less would not.

        Where they do not fit, the first token is the best guess.
        """
        counts = (fit.shares * predicted).round().clamp(min=0)
        gradient = counts @ fit.slopes / predicted
        tolerance = self.tolerance(index, fit)
        fits = float((self.goals[index] - gradient).norm()) <= tolerance
        weakest = min([float(self.least[index]), *fit.slopes.norm(dim=1).tolist()])
        seen = weakest / predicted > 2 * tolerance
        some = {token: int(count) for token, count in zip(fit.tokens, counts.tolist(), strict=True) if count}
        if not fits:
            some = dict.fromkeys(fit.tokens[:1], 1)
        return _Whole(some, fits and seen, gradient)


@dataclass(frozen=True)
class RowTargets:
    """The targets of each row.

    Attributes:
        counts: How often each token is a target of each row.
        clear: Of each row, whether noise leaves no doubt.
        predicted: The number of all targets of the batch, or a part of it that divides all counts: a mean cannot tell.
    """

    counts: list[dict[int, int]]
    clear: list[bool]
    predicted: int


def row_targets(
    rows: OutputRows,
    gradient: Float[Tensor, "inner width"],
    known: Sequence[Sequence[int]],
    precision: float,
    *,
    scaled: bool = False,
) -> RowTargets | None:
    """Count the targets of all rows.

    Rows that are clear are taken off the gradient, and the others are looked at again: being fewer, they are less
    alike, and so less noisy.

    Args:
        rows: The rows.
        gradient: float64, the map's gradient.
        known: Of each row tokens that are targets if all is well.
        precision: Machine epsilon of the client's dtype.
        scaled: Whether the gradient may have been multiplied by any number. Counts then tell the number of targets, and
            need not add up to what their shares are parts of.

    Returns:
        None where the rows are as many as the map has inputs, or none is clear.
    """
    if len(rows) >= rows.inputs.shape[1]:
        return None
    found: dict[int, _Whole] = {}
    left, predicted = list(range(len(rows))), None
    while left:
        look = _Round.of(rows, left, gradient, precision)
        fits = look.fits(known)
        predicted = predicted or common_measure(look.certain_shares(fits))
        if predicted is None:
            return None
        predicted = predicted if scaled else round(predicted)
        fresh = {row: look.whole(index, fits[index], predicted) for index, row in enumerate(left)}
        found |= fresh
        clear = [row for row in left if fresh[row].clear]
        if not clear:
            break
        gradient = gradient - rows.inputs[clear].T @ torch.stack([fresh[row].gradient for row in clear])
        left = [row for row in left if not fresh[row].clear]
    assert predicted is not None
    ordered = [found[row] for row in range(len(rows))]
    total = sum(sum(each.counts.values()) for each in ordered) if scaled else round(predicted)
    return RowTargets([each.counts for each in ordered], [each.clear for each in ordered], total)


def common_measure(shares: Float[Tensor, " shares"]) -> float | None:
    """The least number that makes shares whole: the number of all targets, as exactly as the shares are.

    Args:
        shares: float64, each a whole number over that number.

    Returns:
        None where there is no share, or no number makes them whole.

    Example:
        >>> round(common_measure(torch.tensor([0.4, 0.2000001, 0.4], dtype=torch.float64)), 4)
        5.0
    """
    if not len(shares):
        return None
    least = shares[shares < 1.5 * shares.min()].median()
    for copies in range(1, constants().most_copies + 1):
        whole = (shares / least * copies).round()
        errors = (shares / least * copies - whole).abs()
        if (errors <= constants().coarsest_count * whole.clamp(max=copies)).all():
            return float((whole / shares).median())
    return None
