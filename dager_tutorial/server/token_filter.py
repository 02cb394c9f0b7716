"""The token filter: which tokens at which positions lie in the span of block 0's gradient.

Every token of the vocabulary at every position is tested (chapter `05_token_filter`). The input of block 0's attention
is `(D token + D position) / deviation + bias` with a fixed linear map D, so that its projection on any directions
splits into a token part and a position part: all pairs cost one matrix product instead of one for each position.
A few random directions of the complement decide almost all pairs; the survivors are tested exactly.

What survives is, for models with absolute positions, more than the batch: every token and position of one connected
component of the graph of token-position pairs passes. Nothing here assumes otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.odds import chance_quantile, usual
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Candidates:
    """Tokens that may stand at each position.

    Attributes:
        tokens: int64 token ids by position; rotary models have one entry that holds for every position.
        every_position: True where the one entry holds for every position.
    """

    tokens: tuple[Int[Tensor, " _"], ...]
    every_position: bool

    def at(self, position: int) -> Int[Tensor, " here"]:
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

    def distinct(self) -> Int[Tensor, " tokens"]:
        """The distinct tokens (int64, sorted) that pass the filter anywhere."""
        return torch.cat(self.tokens).unique()


class _Screen:
    """Squared residuals of all tokens at some positions, on a few random directions of the complement.

    The directions decide most pairs: chance lets a false one of residual r through with probability about
    (bound / r) ^ directions, and the exact test follows anyway.
    """

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
        limit = constants().screen_slack * worst * gain
        own = self.token_part.square().sum(1)[:, None] + part.square().sum(1)
        residual = own + 2 * self.token_part @ part.T
        # Squares cancel to within float32 rounding of their largest terms.
        rounding = 1e-6 * own
        if float(self.bias_part.norm()) <= limit:
            largest = self._largest_variance(spread)
            return (residual - rounding <= (2 * limit) ** 2 * largest[:, None]).nonzero()
        scale = self._scales(spread)
        rounding = rounding * scale.square() + 1e-6 * self.bias_part.square().sum()
        residual = residual * scale.square() + self.bias_part.square().sum()
        residual += 2 * ((self.token_part @ self.bias_part)[:, None] + part @ self.bias_part) * scale
        return (residual - rounding <= limit**2).nonzero()

    def _largest_variance(self, spread: Tensor) -> Tensor:
        """The largest that each token's variance can be: enough where the bias lies in the span (tokens)."""
        deviation = self.token_square.clamp(min=0).sqrt() + float(spread.norm(dim=1).max())
        return deviation.square() / self.width + self.source.epsilon

    def _scales(self, spread: Tensor) -> Tensor:
        """One over the deviation of each pair (tokens x positions)."""
        # The positions' spread has mean zero where the norm subtracts means: the tokens' own need not be subtracted.
        variance = self.token_square[:, None] + spread.square().sum(1) + 2 * self.source.tokens @ spread.T
        return (variance / self.width + self.source.epsilon).clamp(min=1e-30).rsqrt()


def filter_tokens(source: FirstInput, span: Span, budget: Budget | None = None) -> Candidates:
    """Test the whole vocabulary at every position against the span of block 0's attention input.

    Positions are visited in order until a stretch of them holds no token.

    Args:
        source: Factors of block 0's attention input.
        span: Span of block 0's query, key and value gradient.
        budget: What it may cost: past the deadline, what was confirmed so far is returned. None for the usual one.

    Returns:
        The candidates, tokens in falling order of fit at each position.

    See chapter `05_token_filter`.
    """
    budget = budget or Budget()
    screen = _Screen(source, span.screen(constants().filter_directions, budget.generator()))
    if source.positions is None:
        alone = screen.directions.new_zeros(1, screen.width)
        pairs = screen.passing(alone, span.worst)
        return Candidates((_confirmed(source, span, pairs[:, 0], None, budget),), every_position=True)
    found: list[Tensor] = []
    for start in range(0, len(source.positions), constants().filter_positions):
        stretch = _stretch(screen, span, start, budget)
        ended = not any(len(tokens) for tokens in stretch)
        if found and ended:
            break
        # A left-padded batch may leave the first positions empty: skip them until the first token.
        if not ended:
            found += [stretch[0][:0]] * (start - len(found)) + stretch
        if budget.late:
            break
    while found and not len(found[-1]):
        found.pop()
    return Candidates(tuple(found), every_position=False)


def _stretch(screen: _Screen, span: Span, start: int, budget: Budget) -> list[Tensor]:
    """Confirmed tokens of each of some positions from `start` on."""
    positions = screen.source.positions
    assert positions is not None
    places = positions[start : start + constants().filter_positions]
    pairs = screen.passing(places, span.worst)
    tokens = [pairs[pairs[:, 1] == index, 0] for index in range(len(places))]
    stretch = [_confirmed(screen.source, span, each, start + index, budget) for index, each in enumerate(tokens)]
    budget.report("filter", start + len(places))
    return stretch


def _confirmed(source: FirstInput, span: Span, tokens: Tensor, position: int | None, budget: Budget) -> Tensor:
    """Those of the tokens whose exact residual is one of a true row, best first."""
    kept, ratios = [tokens[:0]], [source.tokens.new_empty(0)]
    for part in tokens.split(constants().filter_pairs):
        if budget.late:
            break
        places = None if position is None else torch.full_like(part, position)
        ratio = span.ratio(source.vectors(part, places))
        kept.append(part[ratio <= span.bound])
        ratios.append(ratio[ratio <= span.bound])
    return torch.cat(kept)[torch.cat(ratios).argsort(stable=True)]


def filter_by_leverage(source: FirstInput, span: Span, budget: Budget) -> Candidates:
    """Candidates where even block 0 is full: the tokens whose leverage stands out from the vocabulary's.

    Chapter `11_limits`.

    Args:
        source: Factors of block 0's attention input.
        span: Span of block 0's query, key and value gradient.
        budget: What it may cost.

    Returns:
        The candidates of each position up to the first that has none.
    """
    vocabulary = torch.arange(len(source.tokens), device=source.tokens.device)
    needed = chance_quantile(constants().false_alarms / len(vocabulary))
    found: list[Tensor] = []
    for position in range(1 if source.positions is None else len(source.positions)):
        parts = vocabulary.split(constants().filter_pairs)
        leverages = torch.cat(
            [span.log_leverage(source.vectors(part, torch.full_like(part, position))) for part in parts]
        )
        tokens = vocabulary[usual(leverages).deviations(leverages) <= -needed]
        if not len(tokens) or budget.late:
            break
        found.append(tokens)
    return Candidates(tuple(found) or (vocabulary[:0],), every_position=source.positions is None)
