"""What a search came to, whatever the architecture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dager_tutorial.server.subspace import Span
from dager_tutorial.status import Confirmation, Status


@dataclass(frozen=True)
class FoundText:
    """One recovered text.

    Attributes:
        tokens: Token ids.
        ratio: Its residual ratio z, the largest of its rows: about 1 to 2 for a true text.
        confirmation: Whether it is confirmed, and by what.
        labels: The classes it was trained with, one a copy; empty where nothing tells, or there are none.
        copies: How often it stands in the batch; None where nothing tells.
    """

    tokens: tuple[int, ...]
    ratio: float
    confirmation: Confirmation
    labels: tuple[int, ...] = ()
    copies: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The texts that a search found, and what is known of the batch.

    Attributes:
        status: What is known.
        diagnosis: One sentence for people: what this update in particular gave, or why it gave nothing.
        texts: The texts, in the order of their discovery.
        with_targets: Whether the texts hold what the loss asked for and the network did not see.
        size: The number of texts in the batch, where it could be told.
        unexplained: Share of the update (norm over norm, over all shared parameters) that remains when all that was
            recovered is simulated and taken off; None where it was not simulated.
    """

    status: Status
    diagnosis: str
    texts: tuple[FoundText, ...] = ()
    with_targets: bool = False
    size: int | None = None
    unexplained: float | None = None


@dataclass(frozen=True)
class Ends:
    """What the last block says of the places where texts end.

    Attributes:
        seen: Whether it tells ends from other places at all; under a loss that reads every token it does not.
        confirmed: How many of the reported texts end where it has a row.
        reported: How many texts are reported.
        rank: How many ends it has, where its rank is clear and no more prefixes passed than it allows; else None.
    """

    seen: bool
    confirmed: int
    reported: int
    rank: int | None

    @property
    def all_confirmed(self) -> bool:
        """Whether every reported text ends where the last block has a row."""
        return self.seen and self.confirmed == self.reported

    @property
    def complete(self) -> bool:
        """Whether as many texts are confirmed as there are ends, and no other is reported."""
        return self.all_confirmed and self.confirmed == self.rank


def expected_rows(spans: Iterable[Span]) -> int | None:
    """The number of distinct rows of the batch, where a rank with a clear gap tells it."""
    return max((span.rank for span in spans if span.clear and not span.saturated), default=None)
