"""The token filter: which tokens at which positions lie in the span of block 0's gradient.

Every token of the vocabulary at every position is tested (chapter `05_token_filter`). The input of block 0's attention
is `(D token + D position) / deviation + bias` with a fixed linear map D, so that its projection on any directions
splits into a token part and a position part: all pairs cost one matrix product instead of one for each position.
A few random directions of the complement decide almost all pairs; where noise leaves no gap, lengths and leverages of
all pairs do (`pairs`). The survivors are tested exactly.

What survives is, for models with absolute positions, more than the batch: every token and position of one connected
component of the graph of token-position pairs passes. Nothing here assumes otherwise.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.odds import chance_quantile, usual
from dager_tutorial.server.pairs import ROUNDING, Forms, Images, Lengths
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Candidates:
    """Tokens that may stand at each position.

    Attributes:
        tokens: int64 token ids by position; rotary models have one entry that holds for every position.
        every_position: True where the one entry holds for every position.
        prompt: Token ids with which every text begins.
    """

    tokens: tuple[Int[Tensor, " _"], ...]
    every_position: bool
    prompt: tuple[int, ...] = ()

    def at(self, position: int) -> Int[Tensor, " here"]:
        """Token ids (int64) that may stand at a position."""
        if position < len(self.prompt):
            return torch.tensor([self.prompt[position]], device=self.tokens[0].device)
        if self.every_position:
            return self.tokens[0]
        if position < len(self.tokens):
            return self.tokens[position]
        return self.tokens[0][:0]

    @property
    def count(self) -> int:
        """Number of token-position pairs that passed (of tokens, for rotary models)."""
        return sum(len(tokens) for tokens in self.tokens)

    def renamed(self, ids: Int[Tensor, " vocabulary"]) -> Candidates:
        """The candidates of a smaller vocabulary by their usual ids (int64)."""
        return Candidates(tuple(ids.to(each.device)[each] for each in self.tokens), self.every_position)

    def beginning(self, prompt: tuple[int, ...]) -> Candidates:
        """The candidates where every text is known to begin with some tokens."""
        begun = replace(self, prompt=prompt)
        if self.every_position:
            return begun
        length = max(len(self.tokens), len(prompt))
        return replace(begun, tokens=tuple(begun.at(position) for position in range(length)))

    def distinct(self) -> Int[Tensor, " tokens"]:
        """The distinct tokens (int64, sorted) that pass the filter anywhere."""
        return torch.cat([*self.tokens, self.tokens[0].new_tensor(self.prompt)]).unique()


class _Screen:
    """Squared residuals of all tokens at some positions, on a few random directions of the complement.

    The directions decide most pairs: chance lets a false one of residual r through with probability about
    (bound / r) ^ directions, and the exact test follows anyway.
    """

    def __init__(self, source: FirstInput, span: Span, budget: Budget) -> None:
        self.images = Images.of(source, span.screen(constants().filter_directions, budget.generator()))
        self.lengths = Lengths(source)
        bias = 0.0 if source.bias is None else float(source.bias.norm())
        gain = float(source.gain.abs().max()) * source.tokens.shape[1] ** 0.5 + bias
        self.limit = constants().screen_slack * span.worst * gain

    def passing(self, places: Float[Tensor, "places width"]) -> Int[Tensor, "pairs 2"]:
        """Pairs (token, index into `places`) that may be true."""
        if float(self.images.bias.norm()) > self.limit:
            scales = self.lengths.scales(places)
            seen = self.images.squares(places, scales)
            return (seen.values - seen.errors <= self.limit**2).nonzero()
        # Where the bias lies in the span, it is enough how large each token's deviation can be.
        spread = self.lengths.source.spread(places)
        largest = self.lengths.spreads.clamp(min=0).sqrt() + float(spread.norm(dim=1).max())
        variance = largest.square() / spread.shape[1] + self.lengths.source.epsilon
        tokens, images = self.images.tokens, self.images.positions(places)
        own = tokens.square().sum(1)[:, None] + images.square().sum(1)
        largest_square = own + 2 * tokens @ images.T
        return (largest_square - ROUNDING[own.dtype] * own <= (2 * self.limit) ** 2 * variance[:, None]).nonzero()


class _Exact:
    """Residual of every pair against what a true row of its own leverage may have: for spans without a clear gap.

    The screen allows every pair what the weakest direction allows, which may be all that there is.
    """

    def __init__(self, source: FirstInput, span: Span, budget: Budget) -> None:
        basis = span.pulled(span.signal).float().to(source.tokens.device)
        self.span = span
        self.forms = Forms(source, basis, span.strengths.float().to(basis.device) ** -2, budget, span.projection)

    def passing(self, places: Float[Tensor, "places width"]) -> Int[Tensor, "pairs 2"]:
        """Pairs (token, index into `places`) that may be true; those that were tried before the time was spent."""
        found = [torch.empty(0, 2, dtype=torch.long, device=places.device)]
        for pairs in self.forms.at(places):
            leverage = pairs.leverage.values + pairs.leverage.errors
            allowed = self.span.bound**2 * (self.span.noise * leverage + self.span.arithmetic**2 * pairs.size)
            outside = pairs.size - pairs.inside.values - 2 * pairs.inside.errors
            found.append(pairs.chosen(outside <= allowed))
        return torch.cat(found)


@dataclass(frozen=True)
class _Filter:
    """The tests of all pairs, the cheap one and the one that always decides."""

    source: FirstInput
    span: Span
    budget: Budget

    @cached_property
    def screen(self) -> _Screen:
        """What decides nearly all pairs where the signal is clear."""
        return _Screen(self.source, self.span, self.budget)

    @cached_property
    def exact(self) -> _Exact:
        """What decides where it is not."""
        return _Exact(self.source, self.span, self.budget)

    def passing(self, places: Float[Tensor, "places width"]) -> Int[Tensor, "pairs 2"]:
        """Pairs (token, index into `places`) that may be true."""
        pairs = self.screen.passing(places)
        # To test more pairs than there are tokens one by one costs more than to prepare the forms of all.
        return self.exact.passing(places) if len(pairs) > len(self.source.tokens) else pairs


def filter_tokens(
    source: FirstInput, span: Span, budget: Budget | None = None, among: Int[Tensor, " tokens"] | None = None
) -> Candidates:
    """Test the whole vocabulary at every position against the span of block 0's attention input.

    Positions are visited in order until a stretch of them holds no token.

    Args:
        source: Factors of block 0's attention input.
        span: Span of block 0's query, key and value gradient.
        budget: What it may cost: past the deadline, what was confirmed so far is returned. None for the usual one.
        among: int64, the tokens that come into question, sorted; None for all.

    Returns:
        The candidates, tokens in falling order of fit at each position.

    See chapter `05_token_filter`.
    """
    if among is not None:
        return filter_tokens(source.of(among), span, budget).renamed(among)
    test = _Filter(source, span, budget or Budget())
    if source.positions is None:
        pairs = test.passing(source.tokens.new_zeros(1, source.tokens.shape[1]))
        return Candidates((_confirmed(test, pairs[:, 0], None),), every_position=True)
    found: list[Tensor] = []
    for start in range(0, len(source.positions), constants().filter_positions):
        stretch = _stretch(test, source.positions, start)
        ended = not any(len(tokens) for tokens in stretch)
        if found and ended:
            break
        # A left-padded batch may leave the first positions empty: skip them until the first token.
        if not ended:
            found += [stretch[0][:0]] * (start - len(found)) + stretch
        if test.budget.late:
            break
    while found and not len(found[-1]):
        found.pop()
    return Candidates(tuple(found), every_position=False)


def _stretch(test: _Filter, positions: Float[Tensor, "positions width"], start: int) -> list[Tensor]:
    """Confirmed tokens of each of some positions from `start` on."""
    places = positions[start : start + constants().filter_positions]
    pairs = test.passing(places)
    tokens = [pairs[pairs[:, 1] == index, 0] for index in range(len(places))]
    stretch = [_confirmed(test, each, start + index) for index, each in enumerate(tokens)]
    test.budget.report("filter", start + len(places))
    return stretch


def _confirmed(test: _Filter, tokens: Tensor, position: int | None) -> Tensor:
    """Those of the tokens whose exact residual is one of a true row, best first."""
    source, span = test.source, test.span
    kept, ratios = [tokens[:0]], [source.tokens.new_empty(0)]
    for part in tokens.split(constants().filter_pairs):
        if test.budget.late:
            break
        places = None if position is None else torch.full_like(part, position)
        ratio = span.ratio(source.vectors(part, places))
        kept.append(part[ratio <= span.bound])
        ratios.append(ratio[ratio <= span.bound])
    return torch.cat(kept)[torch.cat(ratios).argsort(stable=True)]


def tells_tokens(source: FirstInput, span: Span) -> bool:
    """Whether block 0's span tells tokens from one another: a random token at a random place mostly fails its test.

    It need not in the difference of two weights, where steps below the last place of a weight leave mere rounding.

    Args:
        source: How block 0's input comes about.
        span: The span of block 0's query, key and value gradient.
    """
    draw, pairs = torch.Generator().manual_seed(0), constants().random_pairs
    tokens, places = torch.randint(len(source.tokens), (pairs,), generator=draw), None
    if source.positions is not None:
        places = torch.randint(len(source.positions), (pairs,), generator=draw).to(source.positions.device)
    held = span.holds(source.vectors(tokens.to(source.tokens.device), places))
    return span.saturated or float(held.float().mean()) <= constants().random_held


def filter_by_leverage(source: FirstInput, span: Span, budget: Budget) -> Candidates:
    """Candidates where even block 0 is full: the tokens whose leverage stands out from the vocabulary's.

    Args:
        source: Factors of block 0's attention input.
        span: Span of block 0's query, key and value gradient.
        budget: What it may cost.

    Returns:
        The candidates of each position up to the first that has none.

    See chapter `11_limits`.
    """
    exact = torch.float32 if source.tokens.device.type == "mps" else torch.float64  # squares cancel by far
    parts = (span.pulled(span.directions), span.leverage_weights)
    directions, weights = (part.to(source.tokens.device, exact) for part in parts)
    forms = Forms(source, directions, weights, budget, span.projection)
    positions = source.positions
    places = source.tokens.new_zeros(1, source.tokens.shape[1]) if positions is None else positions
    found: list[Tensor] = []
    for stretch in places.split(constants().filter_positions):
        standing_out = _by_leverage(forms, stretch)
        found += standing_out
        if len(standing_out) < len(stretch):
            break
        budget.report("filter", len(found))
    return Candidates(tuple(found) or (torch.arange(0, device=places.device),), every_position=positions is None)


def _by_leverage(forms: Forms, places: Float[Tensor, "places width"]) -> list[Tensor]:
    """Tokens that stand out at each position, up to the first position that has none; nothing when time is spent."""
    parts = [
        (pairs.leverage.values.clamp(min=1e-300).log() - pairs.size.clamp(min=1e-37).log()).float()
        for pairs in forms.at(places)
    ]
    if forms.budget.late:
        return []
    leverages = torch.cat(parts)
    needed = chance_quantile(constants().false_alarms / len(leverages))
    standing_out = [(usual(each).deviations(each) <= -needed).nonzero()[:, 0] for each in leverages.T]
    return list(itertools.takewhile(len, standing_out))
