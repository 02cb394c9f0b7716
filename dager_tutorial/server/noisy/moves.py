"""Changes of texts that may leave less of an embedding's rows, likeliest first (chapter `14_defences`).

Every change is judged by what it leaves once slopes are computed anew, which takes a pass of the model. Which are worth
one is told by the slopes as they are: they hardly depend on what stands at a place, but for the first few.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.noisy.account import Entry

Slopes = Sequence[Float[Tensor, "_ width"]]


def replacements(
    entries: list[Entry], slopes: Slopes, left: Float[Tensor, "tokens width"], tokens: Int[Tensor, " tokens"]
) -> list[list[Entry]]:
    """The texts with another token at one place, for the places where that leaves least.

    Args:
        entries: Of tokens in question.
        slopes: Theirs.
        left: What they leave of the tokens' rows.
        tokens: int64, sorted, the tokens in question.
    """
    costs = []
    for number, (entry, each) in enumerate(zip(entries, slopes, strict=True)):
        made, own = entry.weight * each, _columns(entry, tokens)
        more = (made * left[own]).sum(1, keepdim=True) - made @ left.T + made.square().sum(1, keepdim=True)
        best = more.scatter(1, own[:, None], torch.inf).min(1)
        changes = zip(best.values.tolist(), tokens[best.indices].tolist(), strict=True)
        costs += [(cost, number, place, token) for place, (cost, token) in enumerate(changes)]
    return [_replaced(entries, *where) for _, *where in sorted(costs)[: constants().neighbours]]


def exchanges(
    entries: list[Entry], slopes: Slopes, left: Float[Tensor, "tokens width"], tokens: Int[Tensor, " tokens"]
) -> list[list[Entry]]:
    """The texts with two tokens of one place exchanged, for the places where that leaves least.

    Args:
        entries: Of tokens in question.
        slopes: Theirs.
        left: What they leave of the tokens' rows.
        tokens: int64, sorted, the tokens in question.
    """
    made = [entry.weight * each for entry, each in zip(entries, slopes, strict=True)]
    columns = [_columns(entry, tokens) for entry in entries]
    costs = []
    for one, other in itertools.combinations(range(len(entries)), 2):
        most = min(len(columns[one]), len(columns[other]))
        here, there = columns[one][:most], columns[other][:most]
        moved = made[one][:most] - made[other][:most]
        more = (moved * (left[here] - left[there])).sum(1) + moved.square().sum(1)
        costs += [(float(more[place]), one, other, place) for place in (here != there).nonzero()[:, 0].tolist()]
    likeliest = sorted(costs)[: constants().neighbours]
    return [_exchanged(entries, one, other, place, place + 1) for _, one, other, place in likeliest]


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


def _columns(entry: Entry, tokens: Tensor) -> Tensor:
    """Where a text's tokens are among those in question."""
    return torch.searchsorted(tokens, tokens.new_tensor(entry.tokens))


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
