"""The texts that one candidate at each position gives: how many there are, and which of them to test.

Chapter `08_encoder_recovery`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import product

from jaxtyping import Int
from torch import Tensor

from dager_tutorial.errors import DagerError
from dager_tutorial.textbook.block_inputs import TokenIds


@dataclass(frozen=True)
class EncoderSearchOptions:
    """What the search leaves out. The defaults leave out nothing, up to ten million texts of each length.

    Attributes:
        candidates_per_position: Keep so many tokens of each position, those nearest to the span of block 0. All
            that pass lie as near as rounding lets them, so that this is close to a random choice. The paper keeps
            as many as the batch has texts, which the server does not know. None: all.
        cap: Most texts of one length that are tested; where there are more, so many are drawn at random.
        remove_used: Take the tokens of the texts found so far away from their positions before the next length
            is searched, as long as a position keeps one. A longer text with one of them at its place is lost.
        seed: Seed of the random draws.
        time_budget: Seconds after which no more texts are tested; None for no limit. Spans and filter, which are
            not interrupted, count when the search is part of the whole attack.

    Raises:
        DagerError: A count is smaller than one, or the time negative.

    Example:
        >>> EncoderSearchOptions(cap=0)
        Traceback (most recent call last):
        dager_tutorial.errors.DagerError: cap is 0: give at least 1
    """

    candidates_per_position: int | None = None
    cap: int = 10_000_000
    remove_used: bool = False
    seed: int = 0
    time_budget: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to search."""
        for name, least in (("candidates_per_position", 1), ("cap", 1), ("time_budget", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise DagerError(f"{name} is {value}: give at least {least}")

    def after(self, seconds: float) -> EncoderSearchOptions:
        """The same options with what is left of the time.

        Args:
            seconds: How many have passed.
        """
        left = None if self.time_budget is None else max(0.0, self.time_budget - seconds)
        return replace(self, time_budget=left)


def search_size(choices: Iterable[Sized]) -> int:
    """How many texts have one of the candidates at each position: their product, exactly.

    Args:
        choices: The candidates of each position.

    Example:
        >>> search_size([[101], [7, 8, 9], [7, 8], [102]])
        6
        >>> search_size([range(105)] * 20) > 10**40
        True
    """
    return math.prod(map(len, choices))


def possible_lengths(candidates: Sequence[Int[Tensor, " _"]], begin: int, end: int) -> list[int]:
    """The lengths that texts may have: the end token passed at their last position, the begin token at the first.

    Args:
        candidates: int64 token ids for each position.
        begin: Token id that begins every text, [CLS] of BERT.
        end: Token id that ends every text, [SEP] of BERT.

    Example:
        >>> import torch
        >>> possible_lengths([torch.tensor([101]), torch.tensor([7, 8]), torch.tensor([102, 9])], 101, 102)
        [3]
    """
    if not len(candidates) or begin not in candidates[0]:
        return []
    return [position + 1 for position, tokens in enumerate(candidates) if position and end in tokens]


def texts_to_test(choices: Sequence[Sequence[int]], cap: int, seed: int) -> Iterator[TokenIds]:
    """Every text of one length, or as many as `cap` random ones where there are more.

    Draws are independent, so that a text may come twice.

    Args:
        choices: Token ids that may stand at each position.
        cap: Most texts to give.
        seed: Seed of the draws.

    Example:
        >>> list(texts_to_test([[101], [7, 8], [102]], cap=2, seed=0))
        [(101, 7, 102), (101, 8, 102)]
    """
    if search_size(choices) <= cap:
        yield from product(*choices)
        return
    chance = random.Random(seed)
    for _ in range(cap):
        yield tuple(chance.choice(tokens) for tokens in choices)


def without_used(words: Sequence[Sequence[int]], found: Iterable[TokenIds]) -> list[list[int]]:
    """The candidates without the tokens of found texts, of which a position keeps its last one.

    Args:
        words: Token ids that may stand at each position.
        found: Texts, in their order.

    Example:
        >>> without_used([[101], [7, 8], [5, 7], [9]], [(101, 7, 5, 102), (101, 8, 7, 102)])
        [[101], [8], [7], [9]]
    """
    left = [list(tokens) for tokens in words]
    for text in found:
        for tokens, used in zip(left, text, strict=False):  # a text is shorter than the longest one may be
            if used in tokens and len(tokens) > 1:
                tokens.remove(used)
    return left
