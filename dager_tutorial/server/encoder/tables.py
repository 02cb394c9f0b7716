"""What the search for whole texts looks things up in: block 0's pairs, and the directions outside its span.

Chapter `08_encoder_recovery`.

A *pair* is a position and a candidate token, the token given by its place among the distinct candidates. All tables
that are combined with float64 lie where the span's directions do; queries, keys and values lie with the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import EncoderAdapter, Projections
from dager_tutorial.server.constants import constants
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates
from dager_tutorial.server.unmixing import Incidence

Pair = tuple[int, int]
"""A position and the index of a token."""

Text = tuple[int, ...]
"""The indices of a text's tokens, from position 0 on."""


@dataclass(frozen=True)
class Clues:
    """What block 0's query, key and value gradient says of the pairs.

    Attributes:
        tokens: int64, the distinct tokens that pass the filter anywhere, sorted: what the indices of tokens mean.
        wide: Which token passes at which position.
        likely: Which of these pairs are likely by the incidence, too; the same where it tells nothing.
        coefficients: float64, the incidence, about 1 where a token of one occurrence stood; 0 where it tells nothing.
        order: The pairs in the order in which to try them, the surest first.
        together: Which tokens surely stand in one text; all False where nothing tells.
    """

    tokens: Int[Tensor, " tokens"]
    wide: Bool[Tensor, "positions tokens"]
    likely: Bool[Tensor, "positions tokens"]
    coefficients: Float[Tensor, "positions tokens"]
    order: tuple[Pair, ...]
    together: Bool[Tensor, "tokens tokens"]


def clues_of(
    candidates: Candidates,
    where: Incidence | None = None,
    together: Bool[Tensor, "tokens tokens"] | None = None,
    device: torch.device | None = None,
) -> Clues:
    """Gather what block 0 tells.

    Args:
        candidates: What passes the token filter.
        where: Incidence of the distinct candidates; None where block 0 does not tell.
        together: Which of them surely stand in one text; None where nothing tells.
        device: Where float64 tables lie; None for where the candidates are.

    Example:
        >>> found = Candidates((torch.tensor([7]), torch.tensor([9, 4])), every_position=False)
        >>> clues = clues_of(found)
        >>> clues.tokens.tolist(), clues.order
        ([4, 7, 9], ((1, 0), (1, 2)))
    """
    tokens = candidates.distinct()
    wide = torch.stack([torch.isin(tokens, passed) for passed in candidates.tokens]).to(device)
    if together is None:
        together = wide.new_zeros(len(tokens), len(tokens))
    if where is None:
        nothing = torch.zeros(wide.shape, dtype=torch.float64, device=wide.device)
        return Clues(tokens.to(device), wide, wide, nothing, _every_pair(wide), together)
    order = _surest_first(wide, where.log_odds)
    return Clues(tokens.to(device), wide, wide & where.likely, where.coefficients, order, together)


def _every_pair(wide: Tensor) -> tuple[Pair, ...]:
    """The pairs that pass, but for position 0, where every text begins alike."""
    return tuple((place, token) for place, token in wide.nonzero().tolist() if place > 0)


def _surest_first(wide: Tensor, log_odds: Tensor) -> tuple[Pair, ...]:
    """The same pairs in falling order of their log-odds."""
    odds = torch.where(wide, log_odds, -math.inf)
    odds[0] = -math.inf
    ranked = odds.flatten().argsort(descending=True)[: int((odds > -math.inf).sum())]
    return tuple(divmod(pair, wide.shape[1]) for pair in ranked.tolist())


@dataclass(frozen=True)
class FirstBlock:
    """Block 0's attention for every pair, and the directions in which its outputs must vanish.

    Attributes:
        query: float32.
        key: float32.
        value: float32.
        scaling: The factor on query-key products.
        span: The span of the attention-output gradient.
    """

    query: Float[Tensor, "positions tokens heads width"]
    key: Float[Tensor, "positions tokens heads width"]
    value: Float[Tensor, "positions tokens heads width"]
    scaling: float
    span: Span

    def rows(self, text: Sequence[int]) -> Projections:
        """Queries, keys and values (float32) of a text.

        Args:
            text: Indices of its tokens.
        """
        places = list(range(len(text)))
        return self.query[places, list(text)], self.key[places, list(text)], self.value[places, list(text)]

    def mixture(self, count: int, generator: torch.Generator) -> Float[Tensor, "heads width chosen"]:
        """Directions (float64) in which outputs must vanish or are small, taken apart by the head that they read.

        Where enough directions lie outside the span, random orthonormal ones of them. Else the weakest of all, each
        over its strength, in a random mixture: a true row leans on all of them alike, any other on the weakest most
        (chapter `11_limits`).

        Args:
            count: How many, at most; all there are where they are fewer.
            generator: Source of randomness, on the CPU.
        """
        full = self.span.blurred or self.span.free < constants().fewest_equations
        found = self._weakest(count, generator) if full else self.span.outside(count, generator)
        return found.unflatten(0, tuple(self.query.shape[2:]))

    def _weakest(self, count: int, generator: torch.Generator) -> Float[Tensor, "inputs chosen"]:
        """The weakest directions, each over its strength, the weakest of length 1, in a random mixture."""
        weights = self.span.leverage_weights.sqrt()[-count:]
        weak = self.span.directions[:, -count:] * (weights / weights[-1])
        mix = torch.randn(len(weights), len(weights), generator=generator, dtype=torch.float64).to(weak.device)
        return weak @ torch.linalg.qr(mix).Q


def first_block(
    adapter: EncoderAdapter,
    tokens: Int[Tensor, " tokens"],
    positions: int,
    span: Span,
) -> FirstBlock:
    """Compute block 0's queries, keys and values of all pairs.

    Args:
        adapter: The architecture.
        tokens: int64, the distinct candidates.
        positions: How many positions hold a token.
        span: The span of the attention-output gradient.
    """
    source, parts = adapter.first_input, []
    tokens = tokens.to(source.tokens.device)
    for position in range(positions):
        parts.append(adapter.project(0, source.vectors(tokens, torch.full_like(tokens, position))))
    query, key, value = (torch.stack(part) for part in zip(*parts, strict=True))
    return FirstBlock(query, key, value, adapter.scaling(0), span)
