"""The rows of a search, each with the one before it: texts that share a beginning share its rows.

Chapter `12_federated`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dager_tutorial.server.constants import constants


@dataclass(frozen=True)
class Row:
    """One token of a beam.

    Attributes:
        parent: Index of the row before, or None.
        token: Its id.
        root: The text's first tokens, behind its prompt: those of its own by which beams are told apart.
        position: Where it stands.
        evidence: By how many deviations it fits better than false ones.
        total: The same, summed along the prefix.
        strong: Whether it stands out.
        weak: By how many more rows than stand out did not, since they last were even.
        doubtful: Whether this row or one before it did not stand out.
    """

    parent: int | None
    token: int
    root: tuple[int, ...]
    position: int
    evidence: float
    total: float
    strong: bool
    weak: int
    doubtful: bool


@dataclass
class Paths:
    """Rows that were kept, parents before children.

    Attributes:
        rows: The rows.
    """

    rows: list[Row] = field(default_factory=list)

    def path(self, index: int) -> list[int]:
        """A row and those before it, the first first.

        Args:
            index: The row.
        """
        path: list[int] = []
        step: int | None = index
        while step is not None:
            path.append(step)
            step = self.rows[step].parent
        return path[::-1]

    def tokens(self, index: int | None) -> tuple[int, ...]:
        """The tokens up to a row.

        Args:
            index: The row; None for none.
        """
        return () if index is None else tuple(self.rows[step].token for step in self.path(index))

    def text(self, row: Row) -> tuple[int, ...]:
        """The tokens up to a row that need not be kept yet.

        Args:
            row: The row.
        """
        return (*self.tokens(row.parent), row.token)

    def usual(self, index: int) -> float:
        """The evidence of a usual row up to one.

        Args:
            index: That one.
        """
        return statistics.median(self.rows[step].evidence for step in self.path(index))

    def mean(self, index: int) -> float:
        """The mean evidence of the rows up to one.

        Args:
            index: That one.
        """
        return self.rows[index].total / (self.rows[index].position + 1)

    def recent(self, row: Row) -> float:
        """The evidence of a text's last rows.

        Args:
            row: The last of them, which need not be kept yet.
        """
        before = [] if row.parent is None else self.path(row.parent)[1 - constants().alike :]
        return row.evidence + sum(self.rows[step].evidence for step in before)

    def replaced(self, end: int, text: Sequence[int]) -> int:
        """Rows for a text in the place of another, with the evidence of the other's rows; the index of its last.

        Args:
            end: The other text's last row.
            text: Token ids.
        """
        old, before = [self.rows[step] for step in self.path(end)], None
        total = 0.0
        for place, token in enumerate(text):
            evidence = old[min(place, len(old) - 1)].evidence
            total += evidence
            strong = place == len(text) - 1
            row = Row(before, token, old[-1].root, place, evidence, total, strong, weak=0, doubtful=False)
            self.rows.append(row)
            before = len(self.rows) - 1
        assert before is not None, "a text has a token"
        return before


def circular(text: Sequence[int]) -> bool:
    """Whether a text ends with the same tokens twice, one behind the other; with few of them, as often as they fit.

    Or goes over its own words again: hardly any of its last tokens is new.

    Args:
        text: Token ids.
    """
    for period in range(1, len(text) // 2 + 1):
        length = max(constants().alike, period)
        if len(text) >= length + period and text[-length:] == text[-length - period : -period]:
            return True
    many = 5 * constants().alike
    return len(text) >= many and len({*text[-many:]} - {*text[:-many]}) <= constants().alike


def repeats(text: Sequence[int]) -> bool:
    """Whether more than half of a text's tokens are said again in it, as in hardly any text that makes sense.

    Args:
        text: Token ids.
    """
    return 2 * len(set(text)) < len(text)


def said_again(
    texts: Sequence[tuple[int, ...]],
    places: Sequence[int],
    tokens: Sequence[int],
    others: Sequence[tuple[int, ...]] = (),
) -> list[bool]:
    """Whether texts, once they are extended, end with three tokens that they had before, or with four of another text.

    Args:
        texts: Token ids.
        places: Which of the texts is extended.
        tokens: By which token.
        others: Token ids of the other texts.
    """
    before, elsewhere = [_windows(text, 3) for text in texts], set().union(*(_windows(text, 4) for text in others))
    ends = [(*texts[place][-3:], token) for place, token in zip(places, tokens, strict=True)]
    return [end[-3:] in before[place] or end in elsewhere for place, end in zip(places, ends, strict=True)]


def _windows(text: tuple[int, ...], length: int) -> set[tuple[int, ...]]:
    """The tokens of a text that stand together, so many of them."""
    return {text[place : place + length] for place in range(len(text) - length + 1)}


def ending_apart(texts: Collection[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of some texts of which no other one has the last tokens.

    Args:
        texts: Token ids.
    """
    tails = Counter(text[-constants().alike :] for text in texts)
    return [text for text in texts if tails[text[-constants().alike :]] == 1]


def shared(texts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens the beginnings of any two texts share at most.

    Args:
        texts: Token ids.
    """
    begun = Counter(text[:end] for text in set(texts) for end in range(1, len(text) + 1))
    return max((len(beginning) for beginning, count in begun.items() if count > 1), default=0)
