"""Quadratic forms of all token-position pairs at once, without computing the vector of any (chapter `05_token_filter`).

Block 0's attention input is `(t + p) * s + b`: a token's part, a position's part, one over the pair's deviation, and
the norm's bias. Whatever is quadratic in it splits likewise: `|M x|^2` is
`s^2 (|M t|^2 + 2 (M t) . (M p) + |M p|^2) + 2 s (M t + M p) . M b + |M b|^2`, so that all pairs cost one product of the
tokens' images with the positions'. Lengths, what lies in a span, and leverages are such forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.server.budget import Budget

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}
"""Squares cancel to within rounding of their largest terms: so much of them, at most."""


class Squares(NamedTuple):
    """A quadratic form of pairs.

    Attributes:
        values: tokens x places.
        errors: Likewise, how far rounding may have moved them.
    """

    values: Float[Tensor, "tokens places"]
    errors: Float[Tensor, "tokens places"]


@dataclass(frozen=True)
class Images:
    """What some directions see of tokens, and of the norm's bias.

    Attributes:
        source: Factors of block 0's attention input.
        directions: As columns, float32 or, where squares cancel much, float64.
        tokens: The tokens' images, likewise.
        bias: The bias', likewise.
    """

    source: FirstInput
    directions: Float[Tensor, "width directions"]
    tokens: Float[Tensor, "tokens directions"]
    bias: Float[Tensor, " directions"]

    @classmethod
    def of(cls, source: FirstInput, directions: Tensor, rows: slice = slice(None)) -> Images:
        """The images of the tokens of some rows of the vocabulary.

        Args:
            source: Factors of block 0's attention input.
            directions: float32 or float64, width x directions.
            rows: Which tokens.
        """
        mapped = source.gain[:, None] * directions
        # The mean is subtracted after the product, so that no second copy of the vocabulary is made.
        tokens = source.tokens[rows].to(directions)
        images = tokens @ mapped
        if source.centred:
            images -= tokens.mean(1)[:, None] * mapped.sum(0)
        bias = mapped.new_zeros(mapped.shape[1]) if source.bias is None else directions.T @ source.bias.to(directions)
        return cls(source, directions, images, bias)

    def positions(self, places: Float[Tensor, "places width"]) -> Float[Tensor, "places directions"]:
        """The images of position embeddings."""
        return self.source.linear(places.to(self.directions)) @ self.directions

    def squares(
        self,
        places: Float[Tensor, "places width"],
        scales: Float[Tensor, "tokens places"],
        weights: Float[Tensor, " directions"] | None = None,
    ) -> Squares:
        """Squared lengths of what the directions see of each pair, bias included.

        Args:
            places: float32, embeddings of the positions (one row of zeros for rotary models).
            scales: float32, one over each pair's deviation.
            weights: Of the directions' squares, in the directions' dtype; None for 1 each.
        """
        weights = torch.ones_like(self.bias) if weights is None else weights
        images, scales = self.positions(places), scales.to(self.bias)
        weighted, bias = images * weights, self.bias * weights
        own = (self.tokens.square() @ weights)[:, None] + (images * weighted).sum(1)
        found = torch.addmm(own, self.tokens, weighted.T, alpha=2).mul_(scales.square())
        found.addcmul_((self.tokens @ bias)[:, None] + images @ bias, scales, value=2)
        largest = own.mul_(scales.square()).add_(self.bias @ bias)
        return Squares(found.add_(self.bias @ bias), largest.mul_(ROUNDING[own.dtype]))


@dataclass(frozen=True)
class Lengths:
    """Lengths of all pairs, before and behind the norm.

    Attributes:
        source: Factors of block 0's attention input.
    """

    source: FirstInput

    @cached_property
    def spreads(self) -> Float[Tensor, " vocabulary"]:
        """Squared length of each token embedding, its mean subtracted where the norm subtracts means."""
        tokens, width = self.source.tokens, self.source.tokens.shape[1]
        squares = torch.linalg.vector_norm(tokens, dim=1).square()
        return squares - width * tokens.mean(1).square() if self.source.centred else squares

    @cached_property
    def _gained(self) -> Tensor:
        """Squared length of each token's part behind the norm's gain."""
        parts = self.source.tokens.split(8192)
        return torch.cat([self.source.linear(part).square().sum(1) for part in parts])

    def scales(
        self, places: Float[Tensor, "places width"], rows: slice = slice(None)
    ) -> Float[Tensor, "tokens places"]:
        """One over the deviation of each pair, float32.

        Args:
            places: float32, embeddings of the positions.
            rows: Which tokens of the vocabulary.
        """
        tokens, spread = self.source.tokens, self.source.spread(places)
        # The positions' spread has mean zero where the norm subtracts means: the tokens' own need not be subtracted.
        variance = self.spreads[rows, None] + spread.square().sum(1) + 2 * tokens[rows] @ spread.T
        return (variance / tokens.shape[1] + self.source.epsilon).clamp(min=1e-30).rsqrt()

    def squares(
        self, places: Float[Tensor, "places width"], scales: Float[Tensor, "tokens places"], rows: slice = slice(None)
    ) -> Float[Tensor, "tokens places"]:
        """Squared length of each pair's vector, float32.

        Args:
            places: float32, embeddings of the positions.
            scales: float32, one over each pair's deviation.
            rows: Which tokens of the vocabulary.
        """
        source, tokens, part = self.source, self.source.tokens[rows], self.source.linear(places)
        bias = torch.zeros_like(source.gain) if source.bias is None else source.bias
        along = torch.cat([2 * part, 2 * bias[None]]) * source.gain
        inner = tokens @ along.T
        if source.centred:
            inner -= tokens.mean(1)[:, None] * along.sum(1)
        found = (self._gained[rows, None] + inner[:, :-1] + part.square().sum(1)) * scales.square()
        found += (inner[:, -1:] + 2 * part @ bias) * scales
        return found + bias.square().sum()


class Pairs(NamedTuple):
    """Some tokens of the vocabulary at some positions.

    Attributes:
        start: The first token's id.
        size: float32, squared lengths of the vectors.
        inside: Squared lengths of what lies in the span.
        leverage: Leverages.
    """

    start: int
    size: Float[Tensor, "tokens places"]
    inside: Squares
    leverage: Squares

    def chosen(self, kept: Bool[Tensor, "tokens places"]) -> Int[Tensor, "pairs 2"]:
        """Token id and index of the place of each pair that is kept."""
        return kept.nonzero() + torch.tensor([self.start, 0], device=kept.device)


class Forms:
    """Length, share inside and leverage of all pairs of the vocabulary with some positions.

    The tokens' images are kept where they fit into the budget's memory, else computed again for each few positions.

    Args:
        source: Factors of block 0's attention input.
        directions: float32 or float64, width x directions, orthonormal (in the projected space, if there is one).
        weights: Of the directions' squares in the leverage, in the same dtype.
        budget: What it may cost.
        projection: What vectors are projected by before they are tested; None for the vectors themselves.
    """

    def __init__(
        self,
        source: FirstInput,
        directions: Float[Tensor, "width directions"],
        weights: Float[Tensor, " directions"],
        budget: Budget,
        projection: Float[Tensor, "r width"] | None = None,
    ) -> None:
        self.source, self.directions, self.weights, self.budget = source, directions, weights, budget
        self.projection = None if projection is None else projection.T.to(directions)
        self.lengths = Lengths(source)
        projected = 0 if projection is None else len(projection)
        count = budget.chunk(directions.element_size() * (sum(directions.shape) + projected))
        self.parts = [slice(start, start + count) for start in range(0, len(source.tokens), count)]

    @cached_property
    def _kept(self) -> Images:
        return Images.of(self.source, self.directions)

    @cached_property
    def _kept_sizes(self) -> Images:
        assert self.projection is not None
        return Images.of(self.source, self.projection)

    def _images(self, rows: slice) -> Images:
        return self._kept if len(self.parts) == 1 else Images.of(self.source, self.directions, rows)

    def at(self, places: Float[Tensor, "places width"]) -> Iterator[Pairs]:
        """Some tokens after the other, until the time is spent.

        Args:
            places: float32, embeddings of the positions (one row of zeros for rotary models).
        """
        for rows in self.parts:
            if self.budget.late:
                return
            images = self._images(rows)
            scales = self.lengths.scales(places, rows)
            size = self._size(places, scales, rows)
            inside, leverage = (images.squares(places, scales, weights) for weights in (None, self.weights))
            yield Pairs(rows.start, size, inside, leverage)

    def _size(self, places: Tensor, scales: Tensor, rows: slice) -> Tensor:
        """Squared lengths of the vectors, as they are tested."""
        if self.projection is None:
            return self.lengths.squares(places, scales, rows)
        kept = len(self.parts) == 1
        images = self._kept_sizes if kept else Images.of(self.source, self.projection, rows)
        return images.squares(places, scales).values.float()
