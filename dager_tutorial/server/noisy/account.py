"""Texts taken off a noised update, and whether what is left is noise and nothing else (chapter `14_defences`).

The noise's deviation is known from entries that hold nothing else, so that what is left of every tensor has a known
length, up to a share of `sqrt(2 / entries)`: the more is shared, the less can hide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from dager_tutorial.server.completion.remainder import norm, widened
from dager_tutorial.server.completion.simulation import Ids, Simulator, of_logits
from dager_tutorial.server.constants import constants
from dager_tutorial.server.noisy.matched import Matched
from dager_tutorial.server.noisy.noise import Noise
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
        noise: What they hold besides.
    """

    def __init__(self, simulator: Simulator, received: Mapping[str, Tensor], noise: Noise) -> None:
        self.simulator, self.noise, self.deviations = simulator, noise, noise.deviations
        device = simulator.network.device
        self.received = {name: received[name].to(device) for name in simulator.shared}
        self.rest = widened(self.received)
        self.entries = sum(each.numel() for each in self.rest.values())

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
        self.rest = self.noise.comparable(self.rest, self.received)

    def matched(self) -> Matched:
        """The matched filter of what is left."""
        sent = {name: self.noise.sent(each) for name, each in self.received.items()}
        return Matched(self.simulator, self.rest, self.deviations, sent)

    def name_of(self, table: Tensor) -> str | None:
        """Under which name an embedding's gradient was shared; None where it was not.

        Args:
            table: The parameter.
        """
        return next((name for name, each in self.simulator.shared.items() if each is table), None)

    def square(self) -> float:
        """The squared length of what is left, in units of the noise."""
        return self.noise.square(self.rest)

    def share(self) -> float:
        """The norm of what is left over that of the update."""
        return norm(self.rest) / norm(self.received)

    def is_noise(self) -> bool:
        """Whether what is left is the noise, no more and no less."""
        return self.noise.explains(self.rest, self.received)

    def is_more(self) -> bool:
        """Whether what is left is longer, as a whole, than the noise: a single tensor hides no text."""
        return self.noise.is_exceeded(self.rest, self.received)

    def hides(self, square: float) -> bool:
        """Whether a text could be missing, and what is left still seem noise.

        Args:
            square: Of its gradient, in units of the noise.
        """
        return square <= 2 * chance_quantile(constants().miss_rate) * math.sqrt(2 * self.entries)
