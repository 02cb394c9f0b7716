"""Texts taken off a noised update, and whether what is left is noise and nothing else (chapter `14_defences`).

The noise's deviation is known from entries that hold nothing else, so that what is left of every tensor has a known
length, up to a share of `sqrt(2 / entries)`: the more is shared, the less can hide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.completion.remainder import widened
from dager_tutorial.server.completion.simulation import Ids, Simulator, of_logits
from dager_tutorial.server.constants import constants
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
        deviation: Of the noise on each entry.
    """

    def __init__(self, simulator: Simulator, received: Mapping[str, Tensor], deviation: float) -> None:
        self.simulator, self.deviation = simulator, deviation
        device = simulator.network.device
        self.rest = widened({name: received[name].to(device) for name in simulator.shared})
        self.entries = sum(each.numel() for each in self.rest.values())

    def take(self, entry: Entry) -> None:
        """Take a text off, or put it back where its weight is negative."""
        slopes = self.simulator.chances([entry.tokens])
        slopes[:, entry.label] -= 1
        self.simulator.subtract(self.rest, [entry.tokens], of_logits(entry.weight * slopes))

    def square(self) -> float:
        """The squared length of what is left."""
        return sum(map(_square, self.rest.values()))

    def signal(self) -> float:
        """The squared length of what is left and no noise."""
        return self.square() - self.entries * self.deviation**2

    def is_noise(self) -> bool:
        """Whether every tensor of what is left is as long as the noise makes it, no more and no less."""
        tensors = [(_square(each), each.numel()) for each in self.rest.values()]
        whole = (sum(square for square, _ in tensors), self.entries)
        most = chance_quantile(constants().false_alarms / (len(tensors) + 1))
        return all(abs(self._deviations(*each)) <= most for each in (*tensors, whole))

    def _deviations(self, square: float, entries: int) -> float:
        """By how many deviations a squared length differs from that of noise."""
        return (square / self.deviation**2 - entries) / math.sqrt(2 * entries)

    def hides(self, square: float) -> bool:
        """Whether a text whose gradient has this squared length could be missing, and what is left still seem noise."""
        most = chance_quantile(constants().miss_rate)
        return square / self.deviation**2 <= 2 * most * math.sqrt(2 * self.entries)


def _square(tensor: Tensor) -> float:
    return sum(precise(part).square().sum().item() for part in tensor.flatten().split(2**22))
