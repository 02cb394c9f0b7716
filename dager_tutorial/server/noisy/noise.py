"""What an update holds besides the gradients of texts: Gaussian noise, the rounding of a grid, or entries not sent.

Chapter `14_defences`.

Each kind knows how far from the sum of true texts an entry may lie, and so when nothing but itself is left.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.completion.remainder import norm
from dager_tutorial.server.constants import constants
from dager_tutorial.server.missing.entries import on_kept
from dager_tutorial.server.missing.quantised import beyond_rounding, grid_deviation
from dager_tutorial.server.odds import chance_quantile

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Noise(ABC):
    """Noise on the entries of an update.

    Attributes:
        deviations: Of the noise, by the update's names.
        told: What it is, in words.
    """

    deviations: Mapping[str, float]
    told: str
    is_exact: ClassVar[bool] = False
    """Whether what was sent is exact but for the client's arithmetic: a simulation that gives it is a proof."""

    def square(self, rest: Tensors) -> float:
        """The squared length of what is left, in units of the noise.

        Args:
            rest: By the update's names.
        """
        return sum(self._squares(rest))

    def sent(self, received: Tensor) -> Tensor | None:
        """Which entries of a tensor were sent; None where all were.

        Args:
            received: The tensor, or some of its rows.
        """
        return None

    def comparable(self, rest: dict[str, Tensor], received: Tensors) -> dict[str, Tensor]:
        """What is left at the entries that were sent.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        return rest

    @abstractmethod
    def explains(self, rest: Tensors, received: Tensors) -> bool:
        """Whether what is left is the noise, no more and no less.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """

    def is_exceeded(self, rest: Tensors, received: Tensors) -> bool:
        """Whether what is left is more than noise as a whole: a single tensor hides no text.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        return not self.explains(rest, received)

    def _squares(self, rest: Tensors) -> Iterable[float]:
        return (_square(each) / self.deviations[name] ** 2 for name, each in rest.items())


class Gaussian(Noise):
    """Noise of one deviation on every entry: the length of what is left of a tensor is known."""

    @staticmethod
    def of(received: Tensors, deviation: float) -> Gaussian:
        """Noise of a deviation that was measured.

        Args:
            received: The update, by name.
            deviation: Of an entry.
        """
        return Gaussian(dict.fromkeys(received, deviation), f"noise of deviation {deviation:.1e} on every entry")

    def explains(self, rest: Tensors, received: Tensors) -> bool:
        """Whether every tensor is as long as the noise makes it.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        sizes = [each.numel() for each in rest.values()]
        tensors = list(zip(self._squares(rest), sizes, strict=True))
        whole = (sum(square for square, _ in tensors), sum(sizes))
        most = chance_quantile(constants().false_alarms / (len(tensors) + 1))
        return all(abs(square - entries) <= most * math.sqrt(2 * entries) for square, entries in (*tensors, whole))

    def is_exceeded(self, rest: Tensors, received: Tensors) -> bool:
        """Whether what is left is longer, as a whole, than the noise.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        entries = sum(each.numel() for each in rest.values())
        most = chance_quantile(constants().miss_rate)
        return self.square(rest) - entries > most * math.sqrt(2 * entries)


@dataclass(frozen=True)
class Grid(Noise):
    """Rounding to a grid: how far from it a number can lie is known.

    Attributes:
        bits: With how many bits an entry was sent.
    """

    bits: int

    @staticmethod
    def of(received: Tensors, bits: int) -> Grid:
        """The rounding of an update.

        Args:
            received: The update, by name.
            bits: With how many bits an entry was sent.
        """
        deviations = {name: grid_deviation(each, bits) for name, each in received.items()}
        return Grid(deviations, f"rounding to {bits} bits on every entry", bits)

    def explains(self, rest: Tensors, received: Tensors) -> bool:
        """Whether every entry is as near the grid as rounding puts it.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        return beyond_rounding(rest, received, self.bits) == 0.0


class Absent(Noise):
    """Entries that were not sent: those that were are exact up to the client's arithmetic."""

    is_exact = True

    @staticmethod
    def of(received: Tensors) -> Absent:
        """What is known of an update of which some entries were sent.

        Args:
            received: The update, by name.
        """
        kept = sum(int((each != 0).sum()) for each in received.values())
        share = kept / sum(each.numel() for each in received.values())
        deviation = constants().certified * norm(received) / math.sqrt(kept)
        return Absent(dict.fromkeys(received, deviation), f"{share:.1%} of the entries was sent")

    def sent(self, received: Tensor) -> Tensor:
        """Those that are not zero.

        Args:
            received: The tensor, or some of its rows.
        """
        return received != 0

    def comparable(self, rest: dict[str, Tensor], received: Tensors) -> dict[str, Tensor]:
        """What is left at the entries that were sent.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        return on_kept(rest, received)

    def explains(self, rest: Tensors, received: Tensors) -> bool:
        """Whether so little is left that a simulation proves what was found.

        Args:
            rest: By the update's names.
            received: The update, by the same names.
        """
        return norm(rest) <= constants().certified * norm(received)


def _square(tensor: Tensor) -> float:
    """The squared length of a tensor, part by part."""
    return sum(precise(part).square().sum().item() for part in tensor.flatten().split(2**22))
