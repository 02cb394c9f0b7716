"""Block 0's gradient taken apart: one gradient row per token and per position, and which token stood where.

The input of block 0's attention is `(D e_t + D p_i) / deviation + beta` for token t at position i, with a fixed
linear map D, so that the gradient is `dW = sum_t (D e_t) A_t^T + sum_i (D p_i) B_i^T + beta c^T`. As long as the
distinct tokens and positions are fewer than the width, these vectors are independent, and least squares gives every
A_t and B_i: sums of the unknown gradients of single rows, over the positions of a token and over the tokens of a
position. A token that occurs once has its row's gradient as A_t; and because A_t is then a summand of B_i, B tells
where the token stood. Chapters 3 and 5 derive and draw it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.server.token_filter import Candidates, first_vectors

# Weight of the ridge in the regression of positions on tokens, as a share of a token's own square.
RIDGE = 1e-3
# Directions of a head's outputs with less than this share of the mean variance count less.
WEAKEST = 1e-3
# A token whose largest coefficient is above this stands at one position only, as far as the regression can tell.
ONCE = 0.8
# It stands at others only where its coefficient is more than this many deviations. Mistakes are for the search to mend.
NOISE = 2.0
# Pairs that are known to stand in different texts, fewer than which say nothing of how alike such pairs may be.
FEWEST_APART = 20
# A normal variable's median absolute value times this is its standard deviation.
MEDIAN_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Marginals:
    """Sums of the gradients of single rows, each row's divided by the deviation of its layer norm.

    Attributes:
        tokens: float64, tokens x outputs: A_t, summed over the positions of a token.
        positions: float64, positions x outputs: B_i, summed over the tokens of a position; None for rotary models.
        fit: Share of the gradient's norm that the basis leaves over; about its relative noise if the tokens are right.
        amplification: How much more noise the marginals may have than the gradient: the basis' condition number.
    """

    tokens: Tensor
    positions: Tensor | None
    fit: float
    amplification: float


def unmix(source: FirstInput, gradient: Tensor, tokens: Tensor, positions: int) -> Marginals | None:
    """Split block 0's gradient into one row per token and one per position.

    Args:
        source: The model's factors of block 0's attention input.
        gradient: float64, outputs x width, the stacked query, key and value gradient.
        tokens: int64, the distinct tokens that pass the filter.
        positions: How many positions hold a token, from 0 on; not used for rotary models.

    Returns:
        The marginals, or None where the data do not determine them: more basis vectors than dimensions, or
        vectors so alike that the gradient's noise fills the answer.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> words, places = (torch.randn(count, 16, generator=draw) for count in (5, 3))
        >>> source = FirstInput(words, places, torch.ones(16), None, 1e-12, centred=True)
        >>> rows = first_vectors(source, torch.tensor([1, 4]), torch.tensor([0, 2])).double()
        >>> per_row = torch.randn(2, 20, generator=draw, dtype=torch.float64)
        >>> found = unmix(source, per_row.T @ rows, torch.tensor([1, 4]), 3)
        >>> bool(found.positions[1].norm() < 1e-5), bool(torch.allclose(found.tokens[0], found.positions[0], atol=1e-5))
        (True, True)
    """
    basis = _basis(source, tokens, positions)
    if len(basis) > basis.shape[1]:
        return None
    left, values, right = torch.linalg.svd(basis.T, full_matrices=False)
    if values[-1] <= values[0] * torch.finfo(torch.float32).eps:
        return None
    marginals = right.T @ ((left.T @ gradient.T) / values[:, None])
    fit = float((basis.T @ marginals - gradient.T).norm() / gradient.norm())
    amplification = float(values[0] / values[-1])
    if fit * amplification >= 1:
        return None
    places = marginals[len(tokens) : len(tokens) + positions] if source.positions is not None else None
    return Marginals(marginals[: len(tokens)], places, fit, amplification)


def _basis(source: FirstInput, tokens: Tensor, positions: int) -> Tensor:
    """Vectors (float64, count x width) that block 0's inputs are made of: tokens, positions, and the norm's bias."""
    if source.positions is None:
        return first_vectors(source, tokens, None).double()
    parts = [source.linear(source.tokens[tokens].double()), source.linear(source.positions[:positions].double())]
    if source.bias is not None and bool(source.bias.abs().max() > 0):
        parts.append(source.bias.double()[None])
    return torch.cat(parts)


@dataclass(frozen=True)
class Incidence:
    """Which token stood where.

    Attributes:
        coefficients: float64, positions x tokens: about 1 where the one occurrence of a token stood, about its share
            of the token's gradient where it stood several times, about 0 elsewhere.
        deviation: float64, tokens: standard deviation of a token's coefficients where it did not stand.
    """

    coefficients: Tensor
    deviation: Tensor

    @property
    def log_odds(self) -> Tensor:
        """Log-odds (float64, positions x tokens) that a token which occurs once stood at a position.

        Both hypotheses are normal with the token's deviation, around 1 and around 0, and a priori all positions
        are alike.
        """
        spread = self.deviation.clamp(min=1e-3).square()
        prior = torch.log(torch.tensor(1.0 / max(len(self.coefficients) - 1, 1), dtype=torch.float64))
        return (self.coefficients - 0.5) / spread + prior

    @property
    def likely(self) -> Tensor:
        """Where a token may stand (bool, positions x tokens): anywhere, unless it clearly stands at one position."""
        once = self.coefficients[1:].max(0).values >= ONCE if len(self.coefficients) > 1 else self.deviation < 0
        return ~once | (self.coefficients > NOISE * self.deviation)


def candidate_tokens(candidates: Candidates) -> Tensor:
    """The distinct tokens (int64, sorted) that pass the filter anywhere."""
    return torch.cat(candidates.tokens).unique()


def incidence(marginals: Marginals, heads: int) -> Incidence:
    """Regress every position's marginal on those of the tokens.

    The rows of frequent tokens, of which only sums are known, are the noise of this regression. They are like all
    other rows, so that every head's outputs are first scaled to the tokens' own covariance: what all rows share, as the
    direction of a text, then weighs no more than what sets one token apart.

    Args:
        marginals: Of a model with absolute positions.
        heads: Number of heads in the stacked query, key and value outputs, all three together.

    Raises:
        ValueError: The model adds no positions to tokens.
    """
    if marginals.positions is None:
        raise ValueError("rotary models add no positions to tokens: block 0 does not tell where a token stood")
    tokens, positions = _whitened(marginals.tokens, marginals.positions, heads)
    gram = tokens @ tokens.T
    ridge = RIDGE * gram.diagonal().clamp(min=1e-12 * gram.diagonal().max()).diag()
    coefficients = torch.linalg.solve(gram + ridge, tokens @ positions.T).T
    elsewhere = coefficients[1:].abs() if len(coefficients) > 1 else torch.zeros_like(coefficients)
    return Incidence(coefficients, MEDIAN_TO_DEVIATION * elsewhere.median(0).values)


def _whitened(tokens: Tensor, positions: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Both marginals with every head's outputs scaled to unit covariance of the tokens, weak directions less."""
    per_head = tokens.unflatten(1, (heads, -1)).transpose(0, 1)
    values, directions = torch.linalg.eigh(per_head.transpose(1, 2) @ per_head)
    floor = WEAKEST * values.mean(1, keepdim=True).clamp(min=1e-300)
    scaled = directions * (values.clamp(min=0) + floor).rsqrt()[:, None]
    places = positions.unflatten(1, (heads, -1)).transpose(0, 1)
    return (per_head @ scaled).transpose(0, 1).flatten(1), (places @ scaled).transpose(0, 1).flatten(1)


def same_text(marginals: Marginals, heads: int, where: Incidence) -> Tensor:
    """Which tokens surely stand in one text, by the direction of their gradients.

    A text's rows share what the loss wants of it: their value gradients are averages of the same vectors, and their
    query gradients combinations of the same keys. Cosines, averaged over heads, are high within a text. How high
    they get between texts is known too: two tokens that stand once, at the same position, are in different texts.
    Query and value are weighted by how well they separate those, and what exceeds all of them is called the same.

    Args:
        marginals: Of a model with absolute positions.
        heads: Number of heads in the stacked query, key and value outputs, all three together.
        where: The incidence of the same marginals.

    Returns:
        bool, tokens x tokens; all False where too few positions are shared to tell.
    """
    rows = marginals.tokens.unflatten(1, (3, heads // 3, -1))[:, [0, 2]]
    rows = rows / rows.norm(dim=3, keepdim=True).clamp(min=1e-300)
    cosines = torch.einsum("achw,bchw->cab", rows, rows) / rows.shape[2]
    best = where.coefficients.max(0)
    second = where.coefficients.topk(min(2, len(where.coefficients)), dim=0).values[-1]
    once = ((best.values - 1).abs() <= 1 - ONCE) & (second < ONCE / 2)
    pairs = once[:, None] & once & ~torch.eye(len(once), dtype=torch.bool, device=once.device)
    apart = pairs & (best.indices[:, None] == best.indices)
    if int(apart.sum()) < 2 * FEWEST_APART:
        return torch.zeros_like(pairs)
    excess = cosines[:, pairs].mean(1) - cosines[:, apart].mean(1)
    weights = (excess / cosines[:, apart].var(1).clamp(min=1e-12)).clamp(min=0)
    likeness = torch.einsum("c,cab->ab", weights, cosines)
    return pairs & ~apart & (likeness > likeness[apart].max())


def mate_residual(rows: Tensor, mates: Tensor) -> Tensor:
    """How far per-row gradients lie from what their text allows: the share outside the span of its mates.

    The query gradient of a token is `sum_j c_j k_j` over the keys of its own text with `sum_j c_j = 0` in each head
    (a softmax does not see a constant). A text longer than a head is wide leaves nothing outside: the residual is then
    0 whatever the text.

    Args:
        rows: float64, rows x heads x width, query gradients of tokens of one text.
        mates: float64, tokens x heads x width, the text's keys.

    Returns:
        float64, rows: the root of the residual's share of the square, over all heads, from 0 to 1.
    """
    differences = (mates[1:] - mates[:1]).permute(1, 2, 0)
    directions = torch.linalg.qr(differences).Q
    targets = rows.transpose(0, 1)
    left = targets - (targets @ directions) @ directions.transpose(1, 2)
    return (left.square().sum((0, 2)) / rows.square().sum((1, 2)).clamp(min=1e-300)).sqrt()
