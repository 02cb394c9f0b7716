"""Discrete moves on the order of a text, which a descent cannot make: LAMP's four kinds.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from jaxtyping import Int
from torch import Tensor, tensor


def swapped(places: Sequence[int], chance: random.Random) -> list[int]:
    """Two places exchanged.

    Args:
        places: Any sequence of at least two.
        chance: The source of randomness.
    """
    first, second = chance.sample(range(len(places)), 2)
    moved = list(places)
    moved[first], moved[second] = moved[second], moved[first]
    return moved


def shifted(places: Sequence[int], chance: random.Random) -> list[int]:
    """One place taken out and put in elsewhere.

    Args:
        places: Any sequence of at least two.
        chance: The source of randomness.
    """
    start = chance.randrange(len(places))
    return _put_elsewhere(places, start, start + 1, chance)


def passage_shifted(places: Sequence[int], chance: random.Random) -> list[int]:
    """Several places that follow each other taken out and put in elsewhere.

    Args:
        places: Any sequence of at least two.
        chance: The source of randomness.
    """
    start, end = sorted(chance.sample(range(len(places) + 1), 2))
    return _put_elsewhere(places, start, end, chance)


def beginning_last(places: Sequence[int], chance: random.Random) -> list[int]:
    """A beginning moved to the end.

    Args:
        places: Any sequence of at least two.
        chance: The source of randomness.
    """
    end = chance.randrange(1, len(places))
    return [*places[end:], *places[:end]]


MOVES: tuple[Callable[[Sequence[int], random.Random], list[int]], ...] = (
    swapped,
    shifted,
    passage_shifted,
    beginning_last,
)


def proposals(free: Sequence[int], length: int, count: int, chance: random.Random) -> Int[Tensor, "count length"]:
    """Orders of a text to try: the present one first, then each kind of move in turn.

    Args:
        free: The places that may move, in order.
        length: Number of places, pads included.
        count: How many orders.
        chance: The source of randomness.

    Returns:
        int64, for each order the place that comes to stand at each place.

    Example:
        >>> proposals([1, 2], 4, 2, random.Random(0)).tolist()
        [[0, 1, 2, 3], [0, 2, 1, 3]]
    """
    orders = [list(range(length)) for _ in range(count)]
    for number, order in enumerate(orders[1:] if len(free) > 1 else []):
        for place, source in zip(free, MOVES[number % len(MOVES)](free, chance), strict=True):
            order[place] = source
    return tensor(orders)


def _put_elsewhere(places: Sequence[int], start: int, end: int, chance: random.Random) -> list[int]:
    """A passage taken out and put in at a random place."""
    rest = [*places[:start], *places[end:]]
    target = chance.randrange(len(rest) + 1)
    return [*rest[:target], *places[start:end], *rest[target:]]
