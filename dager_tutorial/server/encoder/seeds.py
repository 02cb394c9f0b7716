"""Where to begin: seeds, the orders in which they are tried, and what is known besides a seed.

Chapter `08_encoder_recovery`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.tables import Clues, Pair, Text


@dataclass(frozen=True)
class Seed:
    """A token whose position is taken for granted, and around which a text is sought.

    Attributes:
        position: Where it stands.
        token: Its index among the distinct candidates.
        forbidden: A pair that the text must not have, or None.
    """

    position: int
    token: int
    forbidden: Pair | None = None

    @property
    def pair(self) -> Pair:
        """Position and token."""
        return self.position, self.token


def explained(seed: Seed, texts: Collection[Text]) -> bool:
    """Whether a seed stands in a text that was found, so that it leads to nothing new.

    Args:
        seed: One that forbids a pair is asked in spite of the texts it stands in.
        texts: What was found.

    >>> explained(Seed(1, 7), [(0, 7)]), explained(Seed(1, 7, forbidden=(2, 3)), [(0, 7)])
    (True, False)
    """
    if seed.forbidden is not None:
        return False
    return any(seed.position < len(text) and text[seed.position] == seed.token for text in texts)


def by_company(clues: Clues, known_from: Callable[[set[Pair], set[Pair]], bool]) -> Iterator[Seed]:
    """Seeds with companions, the most companions first: the more is known, the less is open.

    Args:
        clues: What block 0 says of the pairs.
        known_from: Whether a company need not be asked for the sake of another: `operator.le` where it is the same or
            a part of it, `operator.eq` where it is the same.
    """
    count, places = clues.together.sum(1), clues.coefficients.argmax(0).tolist()
    seen: list[set[Pair]] = []
    for token in count.argsort(descending=True, stable=True)[: int((count > 0).sum())].tolist():
        seed = Seed(places[token], token)
        company = {seed.pair, *companions(clues, seed).items()}
        if not any(known_from(company, other) for other in seen):
            seen.append(company)
            yield seed


def without_bridges(together: Bool[Tensor, "tokens tokens"]) -> Bool[Tensor, "tokens tokens"]:
    """Take away the mates of tokens whose mates are not mates of each other.

    A token of two texts is the mate of both, and all that is built on it mixes them.

    Args:
        together: Which tokens surely stand in one text.

    >>> two_threes = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1), torch.ones(3, 3)).fill_diagonal_(0).bool()
    >>> two_threes[3], two_threes[:, 3] = True, True  # token 3 is a mate of all others
    >>> without_bridges(two_threes).sum(1).tolist()
    [2, 2, 2, 0, 2, 2, 2]
    """
    linked = (together | torch.eye(len(together), dtype=torch.bool, device=together.device)).float()
    links = ((linked @ linked) * linked).sum(1)
    loyal = links >= constants().loyal * linked.sum(1).square()
    return together & loyal[:, None] & loyal


def overlapping(texts: Collection[Text]) -> Iterator[Seed]:
    """Pairs of found texts, each while one other pair of that text is forbidden: it may belong to two texts.

    A text all of whose pairs stand in others too, as one that begins another and ends like a third, is found so.

    Args:
        texts: What was found.

    >>> [(seed.position, seed.forbidden) for seed in overlapping([(0, 5, 6)])]
    [(1, (2, 6)), (2, (1, 5))]
    """
    for text in texts:
        for absent in range(len(text) - 1, 0, -1):
            for position in dict.fromkeys((1, len(text) // 2, len(text) - 1)):
                if position != absent:
                    yield Seed(position, text[position], forbidden=(absent, text[absent]))


def known_tokens(clues: Clues, seed: Seed) -> dict[int, int]:
    """Position to token: the seed, and the tokens that begin every text where there is just one at each position.

    Args:
        clues: What block 0 says of the pairs.
        seed: The seed.
    """
    begin = itertools.takewhile(lambda place: int(clues.wide[place].sum()) == 1, range(len(clues.wide)))
    return dict([seed.pair]) | {place: int(clues.wide[place].nonzero()[0, 0]) for place in begin}


def companions(clues: Clues, seed: Seed) -> dict[int, int]:
    """Tokens that surely stand in the text of a seed, each where it surely stands.

    One that is the mate of few others is left out: the others are mates of each other, and it may be a mistake. So
    are two that would stand at one position.

    Args:
        clues: What block 0 says of the pairs.
        seed: The seed.

    Returns:
        Position to token.
    """
    mates = clues.together[seed.token].nonzero()[:, 0]
    if len(mates):
        links = clues.together[mates][:, mates].sum(1).double()
        mates = mates[links >= links.median() / 2]
    places = clues.coefficients[:, mates].argmax(0)
    alone = torch.bincount(places, minlength=1)[places] == 1
    return dict(zip(places[alone].tolist(), mates[alone].tolist(), strict=True))
