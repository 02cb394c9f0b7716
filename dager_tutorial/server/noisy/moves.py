"""Changes of texts that may leave less of an embedding's rows, likeliest first (chapter `14_defences`).

Every change is judged by what it leaves once slopes are computed anew, which takes a pass of the model. Which are worth
one is told by the slopes as they are: they hardly depend on what stands at a place, but for the first few.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.noisy.account import Entry


@dataclass(frozen=True)
class Changes:
    """Changes of texts at one place, by the slopes as they are.

    Attributes:
        entries: The texts, of tokens in question.
        slopes: Theirs.
        left: What they leave of the tokens' rows.
        tokens: int64, sorted, the tokens in question.
    """

    entries: list[Entry]
    slopes: Sequence[Float[Tensor, "_ width"]]
    left: Float[Tensor, "tokens width"]
    tokens: Int[Tensor, " tokens"]

    def replacements(self) -> list[list[Entry]]:
        """The texts with another token at one place, for the places where that leaves least."""
        costs = []
        for number, (made, own) in enumerate(zip(self._made, self._columns, strict=True)):
            moved = (made * self.left[own]).sum(1, keepdim=True) - made @ self.left.T
            more = moved + made.square().sum(1, keepdim=True)
            best = more.scatter(1, own[:, None], torch.inf).min(1)
            changes = zip(best.values.tolist(), self.tokens[best.indices].tolist(), strict=True)
            costs += [(cost, number, place, token) for place, (cost, token) in enumerate(changes)]
        likeliest = sorted(costs)[: constants().neighbours]
        return [_replaced(self.entries, *where) for _, *where in likeliest]

    def exchanges(self) -> list[list[Entry]]:
        """The texts with two tokens of one place exchanged, for the places where that leaves least."""
        costs = []
        for one, other in itertools.combinations(range(len(self.entries)), 2):
            most = min(len(self._columns[each]) for each in (one, other))
            here, there = self._columns[one][:most], self._columns[other][:most]
            moved = self._made[one][:most] - self._made[other][:most]
            more = (moved * (self.left[here] - self.left[there])).sum(1) + moved.square().sum(1)
            costs += [(float(more[place]), one, other, place) for place in (here != there).nonzero()[:, 0].tolist()]
        likeliest = sorted(costs)[: constants().neighbours]
        return [_exchanged(self.entries, one, other, place, place + 1) for _, one, other, place in likeliest]

    @cached_property
    def _made(self) -> list[Float[Tensor, "_ width"]]:
        """What each place of the texts makes of its token's row."""
        return [entry.weight * each for entry, each in zip(self.entries, self.slopes, strict=True)]

    @cached_property
    def _columns(self) -> list[Int[Tensor, " _"]]:
        """Where the texts' tokens are among those in question."""
        return [torch.searchsorted(self.tokens, self.tokens.new_tensor(entry.tokens)) for entry in self.entries]


def exchanged_beginnings(entries: list[Entry]) -> Iterator[list[Entry]]:
    """The texts with the beginnings of two of them exchanged: of one token, of two, of four and so on.

    Args:
        entries: Any.
    """
    pairs = list(itertools.combinations(range(len(entries)), 2))
    shortest = {pair: min(len(entries[each].tokens) for each in pair) for pair in pairs}
    for power in range(max(shortest.values(), default=0).bit_length()):
        for one, other in pairs:
            if 2**power < shortest[one, other]:
                yield _exchanged(entries, one, other, 0, 2**power)


def _replaced(entries: list[Entry], number: int, place: int, token: int) -> list[Entry]:
    """Texts of which one has another token at a place."""
    changed, tokens = list(entries), list(entries[number].tokens)
    tokens[place] = token
    changed[number] = entries[number]._replace(tokens=tuple(tokens))
    return changed


def _exchanged(entries: list[Entry], one: int, other: int, start: int, end: int) -> list[Entry]:
    """Texts of which two have changed tokens at some places."""
    changed = list(entries)
    for own, their in ((one, other), (other, one)):
        tokens = list(entries[own].tokens)
        tokens[start:end] = entries[their].tokens[start:end]
        changed[own] = entries[own]._replace(tokens=tuple(tokens))
    return changed
