"""Texts taken off a noised update, and whether what is left is noise and nothing else (chapter `14_defences`).

The noise's deviation is known from entries that hold nothing else, so that what is left of every tensor has a known
length, up to a share of `sqrt(2 / entries)`: the more is shared, the less can hide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.completion.remainder import widened
from dager_tutorial.server.completion.simulation import Ids, Simulator, of_logits
from dager_tutorial.server.constants import constants
from dager_tutorial.server.missing.quantised import beyond_rounding
from dager_tutorial.server.odds import chance_quantile


class Entry(NamedTuple):
    """A text of the account.

    Attributes:
        tokens: Token ids.
        label: Its class.
        weight: Times its gradient it stands in the update: one over the size of the batch, if all is right.
    """

    tokens: Ids
    label: int
    weight: float


class Account:
    """What is left of an update while texts are taken off it and put back.

    Args:
        simulator: Repeats the client's step, of a classification.
        received: The update's gradients by its names.
        deviations: Of the noise on their entries, by the same names.
        bits: With how many bits an entry was sent, where that is the noise.
    """

    def __init__(
        self, simulator: Simulator, received: Mapping[str, Tensor], deviations: Mapping[str, float], bits: int | None
    ) -> None:
        self.simulator, self.deviations, self.bits = simulator, deviations, bits
        device = simulator.network.device
        self.received = {name: received[name].to(device) for name in simulator.shared}
        self.rest = widened(self.received)
        self.entries = sum(each.numel() for each in self.rest.values())

    @property
    def noise(self) -> str:
        """What the noise is, in words."""
        if self.bits is not None:
            return f"rounding to {self.bits} bits"
        return f"noise of deviation {next(iter(self.deviations.values())):.1e}"

    def left_by(self, entries: Sequence[Entry]) -> None:
        """Take some texts off the whole update, and no others."""
        self.rest = widened(self.received)
        if entries:
            self._take(entries)

    def take(self, entry: Entry) -> None:
        """Take a text off, or put it back where its weight is negative."""
        self._take([entry])

    def _take(self, entries: Sequence[Entry]) -> None:
        texts = [entry.tokens for entry in entries]
        slopes = self.simulator.chances(texts)
        for slope, entry in zip(slopes, entries, strict=True):
            slope[entry.label] -= 1
            slope *= entry.weight
        self.simulator.subtract(self.rest, texts, of_logits(slopes))

    def name_of(self, table: Tensor) -> str | None:
        """Under which name an embedding's gradient was shared; None where it was not.

        Args:
            table: The parameter.
        """
        return next((name for name, each in self.simulator.shared.items() if each is table), None)

    def square(self) -> float:
        """The squared length of what is left, in units of the noise."""
        return sum(map(self._square, self.rest))

    def is_noise(self) -> bool:
        """Whether every tensor of what is left is as long as the noise makes it, no more and no less.

        Of a grid more is known: how far from it a number can lie.
        """
        if self.bits is not None:
            return beyond_rounding(self.rest, self.received, self.bits) == 0.0
        tensors = [(self._square(name), each.numel()) for name, each in self.rest.items()]
        whole = (sum(square for square, _ in tensors), self.entries)
        most = chance_quantile(constants().false_alarms / (len(tensors) + 1))
        return all(abs(square - entries) <= most * math.sqrt(2 * entries) for square, entries in (*tensors, whole))

    def is_more(self) -> bool:
        """Whether what is left is longer, as a whole, than the noise: a single tensor hides no text."""
        if self.bits is not None:
            return not self.is_noise()
        most = chance_quantile(constants().miss_rate)
        return self.square() - self.entries > most * math.sqrt(2 * self.entries)

    def hides(self, square: float) -> bool:
        """Whether a text could be missing, and what is left still seem noise.

        Args:
            square: Of its gradient, in units of the noise.
        """
        return square <= 2 * chance_quantile(constants().miss_rate) * math.sqrt(2 * self.entries)

    def _square(self, name: str) -> float:
        parts = self.rest[name].flatten().split(2**22)
        return sum(precise(part).square().sum().item() for part in parts) / self.deviations[name] ** 2
