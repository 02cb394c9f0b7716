"""What an attack by gradient matching must be told besides the update, which the server does not know.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from dager_tutorial.errors import DagerError


@dataclass(frozen=True)
class Told:
    """Knowledge of the batch that earlier attacks take for granted; how many texts there are follows from it.

    Attributes:
        lengths: Number of tokens of each text, special ones included.
        labels: The class of each text in the same order; None where the attack is to optimise labels, too.

    Raises:
        DagerError: There is no text, a length is not positive, or there is not one label to each length.

    Example:
        >>> Told((7, 5), (0, 1)).batch_size
        2
    """

    lengths: tuple[int, ...]
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what no batch is."""
        if not self.lengths or min(self.lengths) < 1:
            raise DagerError(f"lengths are {self.lengths}: give a positive number of tokens for each text")
        if self.labels is not None and len(self.labels) != len(self.lengths):
            raise DagerError(f"there are {len(self.labels)} labels for {len(self.lengths)} lengths: give one per text")
        if self.labels is not None and min(map(operator.index, self.labels)) < 0:
            raise DagerError(f"label {min(self.labels)} is negative: classes are numbered from 0")

    @property
    def batch_size(self) -> int:
        """Number of texts."""
        return len(self.lengths)
