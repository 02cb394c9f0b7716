"""A text from what is known of it: the problem around known tokens, its solution read, round by round.

Chapter `08_encoder_recovery`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.attention import scores
from dager_tutorial.models.tap import precise
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.interior_point import relax
from dager_tutorial.server.encoder.tables import FirstBlock, Pair, Text


class Solution(NamedTuple):
    """A text as the weights tell it.

    Attributes:
        text: The heaviest token of each position.
        weights: Their weights, from 0 to about 1.
    """

    text: Text
    weights: tuple[float, ...]

    @property
    def doubtful(self) -> bool:
        """Whether at most positions no token has most of the weight."""
        return sum(weight > 0.5 for weight in self.weights) < len(self.weights) / 2

    @property
    def settled(self) -> dict[int, int]:
        """Position to token, where there is hardly any doubt."""
        least = constants().settled_weight
        return {place: self.text[place] for place, weight in enumerate(self.weights) if weight > least}


@dataclass(frozen=True)
class Beginning:
    """What a text is begun with.

    Attributes:
        known: Position to token.
        allowed: What may stand elsewhere in the first round.
        later: What may stand there in later rounds, in which more is known.
    """

    known: Mapping[int, int]
    allowed: Bool[Tensor, "positions tokens"]
    later: Bool[Tensor, "positions tokens"]

    def without(self, pair: Pair | None) -> Beginning:
        """The same with one pair less, or with all of them for None.

        >>> Beginning({}, torch.ones(1, 2).bool(), torch.ones(1, 2).bool()).without((0, 1)).later
        tensor([[ True, False]])
        """
        if pair is None:
            return self
        kept = torch.ones_like(self.later)
        kept[pair] = False
        return Beginning(self.known, self.allowed & kept, self.later & kept)

    def after(self, solution: Solution) -> Beginning | None:
        """The next round's beginning, with what a solution settles; None where that is nothing new."""
        known = solution.settled | dict(self.known)
        return Beginning(known, self.later, self.later) if len(known) > len(self.known) else None

    def open_pairs(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Positions and tokens (int64) of all pairs that may be chosen, one at each known position."""
        allowed = self.allowed.clone()
        for place, token in self.known.items():
            allowed[place] = False
            allowed[place, token] = True
        places, tokens = allowed.nonzero().T
        return places, tokens


@dataclass(frozen=True)
class Relaxation:
    """Solves for texts around known tokens.

    Attributes:
        block: Block 0's attention for every pair.
        generator: Draws a mixture of the equations at each call, on the CPU.
        budget: What one relaxation's tables may take: where memory is short there are fewer equations, or none.
    """

    block: FirstBlock
    generator: torch.Generator
    budget: Budget

    def solve(self, beginning: Beginning, equations: int) -> Solution | None:
        """Solve for the text around known tokens.

        Args:
            beginning: What is known, and what may stand elsewhere.
            equations: How many to use, if memory allows.

        Returns:
            The heaviest candidate of each position; None where memory allows too few equations.
        """
        known, (places, tokens) = beginning.known, beginning.open_pairs()
        equations = min(equations, self._affordable(len(places)))
        if equations < constants().fewest_equations:
            return None
        asked = sorted(known)[:: math.ceil(len(known) / constants().queries)]
        queries = self.block.query[asked, [known[place] for place in asked]]
        attention = _exponentials(queries, self.block.key[places, tokens], self.block.scaling)
        outside = self._contributions(places, tokens, equations)
        positions = len(beginning.allowed)
        optional = torch.arange(positions, device=places.device) > max(known)
        measured = math.ceil(equations / len(asked))
        weights = relax(attention, outside, places, optional, measured, self.budget).weights
        return heaviest(places, tokens, weights, positions)

    def _affordable(self, candidates: int) -> int:
        """How many equations fit into memory: tables of heads x directions and four of equations, each x candidates."""
        numbers, heads = self.budget.chunk(8 * candidates), self.block.query.shape[2]
        return max(numbers // (heads + 4), (numbers - heads * self.block.span.width) // 4)

    def _contributions(self, places: Tensor, tokens: Tensor, equations: int) -> Tensor:
        """What each candidate's value contributes outside the span (float64, heads x candidates x directions)."""
        directions = self.block.mixture(equations, self.generator)
        return torch.einsum("chw,hwd->hcd", precise(self.block.value[places, tokens]), directions)


def _exponentials(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Exponentials of the scores (float64, queries x heads x candidates), the largest of a query and head being 1."""
    products = precise(scores(queries, keys, scaling))
    return (products - products.amax(2, keepdim=True)).exp()


def heaviest(
    places: Int[Tensor, " pairs"], tokens: Int[Tensor, " pairs"], weights: Float[Tensor, " pairs"], positions: int
) -> Solution:
    """Read a text off weights: each position's heaviest token, up to the first position that is rather empty.

    Args:
        places: int64.
        tokens: int64.
        weights: float64, from 0 to about 1.
        positions: How many positions there are.

    Example:
        >>> weights = torch.tensor([1.0, 0.25, 0.75, 0.25], dtype=torch.float64)
        >>> heaviest(torch.tensor([0, 1, 1, 2]), torch.tensor([4, 5, 6, 7]), weights, 3)
        Solution(text=(4, 6), weights=(1.0, 0.75))
    """
    text, most = [], []
    for place in range(positions):
        here = places == place
        if float(weights[here].sum()) <= 0.5:
            break
        best = int(weights[here].argmax())
        text.append(int(tokens[here][best]))
        most.append(float(weights[here][best]))
    return Solution(tuple(text), tuple(most))


def grown(
    relaxation: Relaxation,
    beginning: Beginning,
    equations: int,
    rounds: int,
    mend: Callable[[Text], Text | None],
    first: Solution | None = None,
) -> Text | None:
    """Solve for a text; what is settled becomes known in the next round, until the text is confirmed or nothing is new.

    Args:
        relaxation: Solves one round.
        beginning: What is known.
        equations: How many to use in each round.
        rounds: How many rounds, at most.
        mend: Gives a text that is confirmed for one that is nearly right, or None.
        first: The first round's solution, where it is there already.

    Returns:
        The confirmed text, or None.
    """
    solution = first
    for _ in range(rounds):
        solution = solution or relaxation.solve(beginning, equations)
        if solution is None or solution.doubtful:
            return None
        mended = mend(solution.text)
        following = beginning.after(solution)
        if mended is not None or following is None or relaxation.budget.late:
            return mended
        beginning, solution = following, None
    return None
