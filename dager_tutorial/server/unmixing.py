"""Block 0's gradient taken apart: one gradient row per token and per position, and which token stood where.

The input of block 0's attention is `(D e_t + D p_i) / deviation + beta` for token t at position i, with a fixed
linear map D, so that the gradient is `dW = sum_t (D e_t) A_t^T + sum_i (D p_i) B_i^T + beta c^T`. As long as the
distinct tokens and positions are fewer than the width, these vectors are independent, and least squares gives every
A_t and B_i: sums of the unknown gradients of single rows, over the positions of a token and over the tokens of a
position. A token that occurs once has its row's gradient as A_t; and because A_t is then a summand of B_i, B tells
where the token stood. Chapter `07_unmixing` derive and draw it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants
from dager_tutorial.server.odds import MEDIAN_TO_DEVIATION


@dataclass(frozen=True)
class Marginals:
    """Sums of the gradients of single rows, each row's divided by the deviation of its layer norm.

    Attributes:
        tokens: float64, A_t, summed over the positions of a token.
        positions: float64, B_i, summed over the tokens of a position; None for rotary models.
        fit: Share of the gradient's norm that the basis leaves over; about its relative noise if the tokens are right.
        amplification: How much more noise the marginals may have than the gradient: the basis' condition number.
    """

    tokens: Float[Tensor, "tokens outputs"]
    positions: Float[Tensor, "positions outputs"] | None
    fit: float
    amplification: float


def unmix(
    source: FirstInput, gradient: Float[Tensor, "outputs width"], tokens: Int[Tensor, " tokens"], positions: int
) -> Marginals | None:
    """Split block 0's gradient into one row per token and one per position (chapter `07_unmixing`).

    Args:
        source: The model's factors of block 0's attention input.
        gradient: float64, the stacked query, key and value gradient.
        tokens: int64, the distinct tokens that pass the filter.
        positions: How many positions hold a token, from 0 on; not used for rotary models.

    Returns:
        The marginals, or None where the data do not determine them: more basis vectors than dimensions, or
        vectors so alike that the gradient's noise fills the answer.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> words, places = (torch.randn(count, 16, generator=draw) for count in (5, 3))
        >>> source = FirstInput(words, places, torch.ones(16), None, 1e-12, centred=True)
        >>> rows = source.vectors(torch.tensor([1, 4]), torch.tensor([0, 2])).double()
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
        return precise(source.vectors(tokens, None))
    parts = [source.linear(precise(table)) for table in (source.tokens[tokens], source.positions[:positions])]
    if source.bias is not None and bool(source.bias.abs().max() > 0):
        parts.append(precise(source.bias)[None])
    return torch.cat(parts)


@dataclass(frozen=True)
class Incidence:
    """Which token stood where.

    Attributes:
        coefficients: float64, about 1 where the one occurrence of a token stood, about its share of the token's
            gradient where it stood several times, about 0 elsewhere.
        deviation: float64, standard deviation of a token's coefficients where it did not stand.
    """

    coefficients: Float[Tensor, "positions tokens"]
    deviation: Float[Tensor, " tokens"]

    @property
    def log_odds(self) -> Float[Tensor, "positions tokens"]:
        """Log-odds (float64) that a token which occurs once stood at a position.

        Both hypotheses are normal with the token's deviation, around 1 and around 0, and a priori all positions
        are alike.
        """
        spread = self.deviation.clamp(min=1e-3).square()
        return (self.coefficients - 0.5) / spread - math.log(max(len(self.coefficients) - 1, 1))

    @property
    def likely(self) -> Bool[Tensor, "positions tokens"]:
        """Where a token may stand: anywhere, unless it clearly stands at one position. The search mends mistakes."""
        tells = len(self.coefficients) > 1
        once = self.coefficients[1:].max(0).values >= constants().once if tells else self.deviation < 0
        return ~once | (self.coefficients > constants().coefficient_noise * self.deviation)


def incidence(marginals: Marginals, heads: int) -> Incidence:
    """Regress every position's marginal on those of the tokens (chapter `07_unmixing`).

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
    ridge = constants().ridge * gram.diagonal().clamp(min=1e-12 * gram.diagonal().max()).diag()
    coefficients = torch.linalg.solve(gram + ridge, tokens @ positions.T).T
    elsewhere = coefficients[1:].abs() if len(coefficients) > 1 else torch.zeros_like(coefficients)
    return Incidence(coefficients, MEDIAN_TO_DEVIATION * elsewhere.median(0).values)


def _whitened(tokens: Tensor, positions: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Both marginals with every head's outputs scaled to unit covariance of the tokens, weak directions less."""
    per_head = tokens.unflatten(1, (heads, -1)).transpose(0, 1)
    values, directions = torch.linalg.eigh(per_head.transpose(1, 2) @ per_head)
    floor = constants().weakest * values.mean(1, keepdim=True).clamp(min=1e-300)
    scaled = directions * (values.clamp(min=0) + floor).rsqrt()[:, None]
    places = positions.unflatten(1, (heads, -1)).transpose(0, 1)
    return (per_head @ scaled).transpose(0, 1).flatten(1), (places @ scaled).transpose(0, 1).flatten(1)


def same_text(marginals: Marginals, heads: int, where: Incidence) -> Bool[Tensor, "tokens tokens"]:
    """Which tokens surely stand in one text, by the direction of their gradients (chapter `07_unmixing`).

    A text's rows share what the loss wants of it: their value gradients are averages of the same vectors, and their
    query gradients combinations of the same keys. Cosines, averaged over heads, are high within a text. How high
    they get between texts is known too: two tokens that stand once, at the same position, are in different texts.
    Query and value are weighted by how well they separate those, and what exceeds all of them is called the same.

    Args:
        marginals: Of a model with absolute positions.
        heads: Number of heads in the stacked query, key and value outputs, all three together.
        where: The incidence of the same marginals.

    Returns:
        Symmetric; all False where too few positions are shared to tell.
    """
    place, once = _places(where)
    pairs = once[:, None] & once & ~torch.eye(len(once), dtype=torch.bool, device=once.device)
    apart = pairs & (place[:, None] == place)
    if int(apart.sum()) < 2 * constants().fewest_apart:
        return torch.zeros_like(pairs)
    cosines = _cosines(marginals.tokens, heads)
    excess = cosines[:, pairs].mean(1) - cosines[:, apart].mean(1)
    weights = (excess / cosines[:, apart].var(1).clamp(min=1e-12)).clamp(min=0)
    likeness = torch.einsum("c,cab->ab", weights, cosines)
    return pairs & ~apart & (likeness > likeness[apart].max())


def _places(where: Incidence) -> tuple[Tensor, Tensor]:
    """Where each token most likely stands (int64), and whether it surely stands there and nowhere else (bool)."""
    best = where.coefficients.max(0)
    second = where.coefficients.topk(min(2, len(where.coefficients)), dim=0).values[-1]
    least = constants().once
    return best.indices, ((best.values - 1).abs() <= 1 - least) & (second < least / 2)


def _cosines(tokens: Tensor, heads: int) -> Tensor:
    """Cosines of the tokens' query and of their value gradients (2 x tokens x tokens), averaged over heads."""
    rows = tokens.unflatten(1, (3, heads // 3, -1))[:, [0, 2]]
    rows = rows / rows.norm(dim=3, keepdim=True).clamp(min=1e-300)
    return torch.einsum("achw,bchw->cab", rows, rows) / rows.shape[2]


def mate_residual(
    rows: Float[Tensor, "rows heads width"], mates: Float[Tensor, "tokens heads width"]
) -> Float[Tensor, " rows"]:
    """How far per-row gradients lie from what their text allows: the share outside the span of its mates.

    Chapter `07_unmixing`.

    The query gradient of a token is `sum_j c_j k_j` over the keys of its own text with `sum_j c_j = 0` in each head
    (a softmax does not see a constant). A text longer than a head is wide leaves nothing outside: the residual is then
    0 whatever the text.

    Args:
        rows: float64, query gradients of tokens of one text.
        mates: float64, the text's keys.

    Returns:
        float64, the root of the residual's share of the square, over all heads, from 0 to 1.
    """
    differences = (mates[1:] - mates[:1]).permute(1, 2, 0)
    directions = torch.linalg.qr(differences).Q
    targets = rows.transpose(0, 1)
    left = targets - (targets @ directions) @ directions.transpose(1, 2)
    return (left.square().sum((0, 2)) / rows.square().sum((1, 2)).clamp(min=1e-300)).sqrt()
