"""The token filter: which tokens at which positions lie in the span of block 0's gradient.

Every token of the vocabulary at every position is tested (chapter 3). The input of block 0's attention is
`(D token + D position) / deviation + bias` with a fixed linear map D, so that its projection on any directions
splits into a token part and a position part: all pairs cost one matrix product instead of one for each position.
A few random directions of the complement decide almost all pairs; the survivors are tested exactly.

What survives is, for models with absolute positions, more than the batch: every token and position of one connected
component of the graph of token-position pairs passes (chapter 3). Nothing here assumes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.server.subspace import Span

# Directions that decide most pairs. Chance lets a false pair of residual r through with probability about
# (bound / r)^64, and the exact test follows anyway.
SCREEN_DIRECTIONS = 64
POSITIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Candidates:
    """Tokens that may stand at each position.

    Attributes:
        tokens: int64 token ids by position; rotary models have one entry that holds for every position.
        every_position: True where the one entry holds for every position.
    """

    tokens: tuple[Tensor, ...]
    every_position: bool

    def at(self, position: int) -> Tensor:
        """Token ids (int64) that may stand at a position."""
        if self.every_position:
            return self.tokens[0]
        if position < len(self.tokens):
            return self.tokens[position]
        return self.tokens[0][:0]

    @property
    def count(self) -> int:
        """Number of token-position pairs that passed (of tokens, for rotary models)."""
        return sum(len(tokens) for tokens in self.tokens)


def first_vectors(source: FirstInput, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """Inputs of block 0's attention for token-position pairs.

    Args:
        source: The model's factors.
        tokens: int64, pairs.
        positions: int64, pairs; None for rotary models.

    Returns:
        float32, pairs x width.
    """
    embedding = source.tokens[tokens]
    if source.positions is not None and positions is not None:
        embedding = embedding + source.positions[positions]
    spread = source.spread(embedding)
    vectors = spread / (spread.square().mean(-1, keepdim=True) + source.epsilon).sqrt() * source.gain
    return vectors if source.bias is None else vectors + source.bias


class _Screen:
    """Squared residuals of all tokens at some positions, on a few random directions of the complement."""

    def __init__(self, source: FirstInput, directions: Tensor) -> None:
        self.source, self.directions = source, directions
        self.width = directions.shape[0]
        # The mean is subtracted after the product, so that no second copy of the vocabulary is made.
        mapped = source.gain[:, None] * directions
        means = source.tokens.mean(1) * source.centred
        self.token_part = source.tokens @ mapped - means[:, None] * mapped.sum(0)
        self.token_square = torch.linalg.vector_norm(source.tokens, dim=1).square() - self.width * means.square()
        bias = source.bias if source.bias is not None else directions.new_zeros(self.width)
        self.bias_part = bias @ directions
        self.bias_size = float(bias.norm())

    def passing(self, positions: Tensor, worst: float) -> Tensor:
        """Pairs (count x 2, int64: token, index into `positions`) that may be true.

        Args:
            positions: float32, positions x width, embeddings of the positions (one row of zeros for rotary models).
            worst: The largest residual of a true row of length 1.
        """
        part, spread = self.source.linear(positions) @ self.directions, self.source.spread(positions)
        gain = float(self.source.gain.abs().max()) * self.width**0.5 + self.bias_size
        limit = 2 * worst * gain
        own = self.token_part.square().sum(1)[:, None] + part.square().sum(1)
        residual = own + 2 * self.token_part @ part.T
        # Squares cancel to within float32 rounding of their largest terms.
        rounding = 1e-6 * own
        if float(self.bias_part.norm()) <= limit:
            # The bias lies in the span: no deviation is needed, only the largest it can be.
            deviation = self.token_square.clamp(min=0).sqrt() + float(spread.norm(dim=1).max())
            largest = deviation.square() / self.width + self.source.epsilon
            return (residual - rounding <= (2 * limit) ** 2 * largest[:, None]).nonzero()
        # The positions' spread has mean zero where the norm subtracts means: the tokens' own need not be subtracted.
        variance = self.token_square[:, None] + spread.square().sum(1) + 2 * self.source.tokens @ spread.T
        scale = (variance / self.width + self.source.epsilon).clamp(min=1e-30).rsqrt()
        rounding = rounding * scale.square() + 1e-6 * self.bias_part.square().sum()
        residual = residual * scale.square() + self.bias_part.square().sum()
        residual += 2 * ((self.token_part @ self.bias_part)[:, None] + part @ self.bias_part) * scale
        return (residual - rounding <= limit**2).nonzero()


def filter_tokens(
    source: FirstInput,
    span: Span,
    *,
    seed: int = 0,
    chunk: int = 8192,
    progress: Callable[[int, int | None], None] | None = None,
) -> Candidates:
    """Test the whole vocabulary at every position against the span of block 0's attention input.

    Positions are visited in order until a stretch of them holds no token.

    Args:
        source: Factors of block 0's attention input.
        span: Span of block 0's query, key and value gradient.
        seed: Seed of the screening directions.
        chunk: Pairs that are tested exactly at once.
        progress: Called with positions done and None.

    Returns:
        The candidates, tokens in falling order of fit at each position.
    """
    directions = span.screen(SCREEN_DIRECTIONS, torch.Generator().manual_seed(seed))
    screen = _Screen(source, directions)
    if source.positions is None:
        alone = torch.zeros(1, screen.width, device=directions.device)
        pairs = screen.passing(alone, span.worst)
        return Candidates((_confirmed(source, span, pairs[:, 0], None, chunk),), every_position=True)
    found: list[Tensor] = []
    for start in range(0, len(source.positions), POSITIONS_AT_ONCE):
        places = source.positions[start : start + POSITIONS_AT_ONCE]
        pairs = screen.passing(places, span.worst)
        stretch = _by_position(source, span, pairs, start, len(places), chunk)
        if progress:
            progress(start + len(places), None)
        if found and not any(len(tokens) for tokens in stretch):
            break
        # A left-padded batch may leave the first positions empty: skip them until the first token.
        if found or any(len(tokens) for tokens in stretch):
            found += [pairs[:0, 0]] * (start - len(found)) + stretch
    while found and not len(found[-1]):
        found.pop()
    return Candidates(tuple(found), every_position=False)


def _by_position(source: FirstInput, span: Span, pairs: Tensor, start: int, count: int, chunk: int) -> list[Tensor]:
    """Confirmed tokens of each of `count` positions from `start` on."""
    passed = []
    for index in range(count):
        tokens = pairs[pairs[:, 1] == index, 0]
        passed.append(_confirmed(source, span, tokens, start + index, chunk))
    return passed


def _confirmed(source: FirstInput, span: Span, tokens: Tensor, position: int | None, chunk: int) -> Tensor:
    """Those of the tokens whose exact residual is one of a true row, best first."""
    kept, ratios = [tokens[:0]], [torch.empty(0, device=tokens.device)]
    for part in tokens.split(chunk):
        places = None if position is None else torch.full_like(part, position)
        ratio = span.ratio(first_vectors(source, part, places))
        kept.append(part[ratio <= span.bound])
        ratios.append(ratio[ratio <= span.bound])
    return torch.cat(kept)[torch.cat(ratios).argsort(stable=True)]
