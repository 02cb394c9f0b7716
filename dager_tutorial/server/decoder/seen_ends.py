"""Where texts end by the last block, and which of them may be wrong further back.

Chapter `12_federated`.

A text with a wrong token far from its end still fits there better than one that goes on, though worse than the others
of its batch do. So there are two limits, and both are the batch's own: one for texts that are told to be whole, and a
wider one for texts behind whose last token nothing is to be sought, whatever is wrong further back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dager_tutorial.server.constants import constants


class Limits(NamedTuple):
    """How badly texts may fit.

    Attributes:
        told: One that is told to be whole.
        seen: One that ends where it seems to, though some of its tokens may be wrong.
    """

    told: float
    seen: float


NO_LIMITS = Limits(math.inf, math.inf)


@dataclass
class SeenEnds:
    """Rows at which texts end.

    Attributes:
        misfits: How badly texts fit there, as `End.misfit`.
        doubted: Rows at which a text fits so badly that it may be wrong further back.
    """

    misfits: dict[int, float] = field(default_factory=dict)
    doubted: set[int] = field(default_factory=set)

    def __contains__(self, row: object) -> bool:
        """Whether a text ends at a row."""
        return row in self.misfits

    def __iter__(self) -> Iterator[int]:
        """The rows."""
        return iter(self.misfits)

    def add(self, row: int, misfit: float, *, told: bool) -> None:
        """A text ends at a row.

        Args:
            row: Its index.
            misfit: How badly it fits there.
            told: Whether it is told to be whole.
        """
        self.misfits[row] = misfit
        (self.doubted.discard if told else self.doubted.add)(row)

    def keep(self, rows: Iterable[int]) -> None:
        """Forget all ends but those at some rows.

        Args:
            rows: Their indices.
        """
        self.misfits = {row: self.misfits[row] for row in rows if row in self.misfits}
        self.doubted &= set(self.misfits)

    def told(self, rows: Iterable[int]) -> list[int]:
        """Those of some rows at which texts are told to be whole.

        Args:
            rows: Their indices.
        """
        return [row for row in rows if row in self.misfits and row not in self.doubted]

    def limits(self, rows: Iterable[int]) -> Limits:
        """How badly texts may fit: one that is told to be whole hardly worse than others.

        Args:
            rows: The last rows of the texts of a batch.
        """
        found = [self.misfits[row] for row in self.told(rows)]
        if not found:
            return Limits(constants().end_misfit, constants().end_misfit)
        usual = statistics.median(found)
        seen = usual + constants().seen_share * (constants().no_end - usual)
        return Limits(usual + constants().end_beside, min(constants().seen_misfit, seen))

    def doubt(self, rows: Iterable[int], limit: float = math.inf) -> None:
        """Tell no text to be whole that fits worse than a limit, or far worse than the others.

        Args:
            rows: The last rows of the texts of a batch.
            limit: How badly one may fit at all.
        """
        told, seen = self.limits(rows)
        told = min(limit, told)
        self.doubted |= {row for row, misfit in self.misfits.items() if misfit > told}
        self.keep([row for row, misfit in self.misfits.items() if misfit <= max(told, seen)])
