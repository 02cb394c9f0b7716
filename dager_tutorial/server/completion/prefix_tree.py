"""Prefixes that the network saw, and the texts that end behind them, from counts of targets.

A prefix counts the texts that go on from it, token by token. Those that its children count themselves go on further;
the others end with that token.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dager_tutorial.server.completion.output_rows import Place
from dager_tutorial.server.completion.simulation import Ids


@dataclass(frozen=True)
class EndedTexts:
    """Whole texts.

    Attributes:
        texts: Each with its copies.
        unclear: Rows whose counts do not say all.
    """

    texts: Counter[Ids]
    unclear: int


@dataclass(frozen=True)
class PrefixTree:
    """The prefixes of some leaves.

    A first token repeated is one row at every length where positions enter by rotation only: what attends to equal
    vectors is their mean. Its shortest prefix stands for all of them.

    Attributes:
        rows: Where each row is computed.
        following: The tokens that follow each row in some leaf.
        longest: For each first token the longest run of it at the beginning of a leaf.
        repeats: Whether a first token repeated is one row.
    """

    rows: dict[Ids, Place]
    following: dict[Ids, tuple[int, ...]]
    longest: dict[int, int]
    repeats: bool

    @classmethod
    def of(cls, leaves: Sequence[Ids], *, repeats: bool) -> PrefixTree:
        """The tree.

        Args:
            leaves: Token ids.
            repeats: Whether a first token repeated is one row.
        """
        rows: dict[Ids, Place] = {}
        following: dict[Ids, dict[int, None]] = {}
        longest: dict[int, int] = {}
        for index, leaf in enumerate(leaves):
            run = _run(leaf) if repeats else 1
            longest[leaf[0]] = max(run, longest.get(leaf[0], 1))
            for end in range(1, len(leaf) + 1):
                row = leaf[:1] if end <= run else leaf[:end]
                rows.setdefault(row, Place(index, end - 1))
                following.setdefault(row, {}).update(dict.fromkeys(leaf[end : end + 1]))
        return cls(rows, {row: tuple(tokens) for row, tokens in following.items()}, longest, repeats)

    def ends(self, counts: Mapping[Ids, Mapping[int, int]], clear: Mapping[Ids, bool]) -> EndedTexts:
        """The texts behind the counts.

        Args:
            counts: Of each row how often each token follows it.
            clear: Of each row, whether noise leaves no doubt. Where it does, what follows is what must.
        """
        texts: Counter[Ids] = Counter()
        passing: dict[Ids, int] = {}
        unclear = sum(not each for each in clear.values())
        for row in sorted(self.rows, key=len, reverse=True):
            below, here = self._below(row, passing), Counter(counts[row])
            if not clear[row]:
                here |= Counter({token: max(1, below[token]) for token in self.following[row]})
            passing[row] = here.total()
            left = +(here - below)
            ended, doubtful = _ended(row, left, repeats=self.repeats)
            texts.update(ended)
            unclear += doubtful or bool(below - here)
        return EndedTexts(texts, unclear)

    def _below(self, row: Ids, passing: Mapping[Ids, int]) -> Counter[int]:
        """How many of the texts after a row go on to a longer one, token by token."""
        run = self.longest.get(row[0], 1) if len(row) == 1 else 1
        used: Counter[int] = Counter()
        for length in range(1, run + 1):
            prefix = row[:1] * (length - 1) + row
            for token in self.following[row]:
                used[token] += passing.get((*prefix, token), 0)
                used[row[0]] += passing.get((*prefix, token), 0) * (length - 1)
        return +used


def _ended(row: Ids, left: Counter[int], *, repeats: bool) -> tuple[Counter[Ids], bool]:
    """The texts that end behind a row, and whether others explain it equally.

    How often a first token was repeated, and before which ending, a rotary model cannot tell: the fewest texts do.
    """
    endings = sorted(left.elements())
    spare = left[row[0]] if repeats and len(row) == 1 else 0
    if not spare:
        return Counter((*row, token) for token in endings), False
    others = [token for token in endings if token != row[0]]
    longest = (*row * (1 + spare), *others[:1])
    return Counter([longest, *((*row, token) for token in others[1:])]), spare + len(others) > 1


def _run(leaf: Ids) -> int:
    """How often a text's first token stands at its beginning."""
    return next((place for place, token in enumerate(leaf) if token != leaf[0]), len(leaf))
