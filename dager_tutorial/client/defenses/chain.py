"""Several defences, one after the other, and what they left (chapter `14_defences`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dager_tutorial.client.defenses.clipping import length, size
from dager_tutorial.client.defenses.noise import Noise, generator
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.update import Update

FULL = 32  # bits of a number that no defence rounds
INDEX = 32  # bits of the place of a number among those of its tensor


@runtime_checkable
class Defence(Protocol):
    """A defence: a record of its options that is called with gradients, changes none of them and returns others."""

    @property
    def told(self) -> str:
        """What a server is told: the defence and its strength, nothing drawn and nothing measured."""

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator, /) -> dict[str, Tensor]:
        """The defended gradients."""


@dataclass(frozen=True)
class Left:
    """What is left of gradients behind defences.

    Attributes:
        norm: Length of what the client computed.
        bounded: Length of what noise was added to; without noise that of what is sent.
        deviation: Standard deviation of the noise, 0 without.
        kept: How many numbers are sent that are not zero.
        numbers: How many numbers there are.
        bits: Bits of a number.
    """

    norm: float
    bounded: float
    deviation: float
    kept: int
    numbers: int
    bits: int

    @property
    def relative(self) -> float:
        """The noise's deviation over the length of what it was added to."""
        return self.deviation / self.bounded if self.bounded else 0.0

    @property
    def bytes(self) -> int:
        """Bytes to send: all numbers, or those that are not zero, with an index each or a map of bits."""
        sparse = self.kept * self.bits + min(self.kept * INDEX, self.numbers)
        return -(-min(self.numbers * self.bits, sparse) // 8)

    def to_json(self) -> dict[str, Any]:
        """The numbers that a reader asks for."""
        return {
            "gradient_norm": self.norm,
            "noise_deviation": self.deviation,
            "noise_over_norm": self.relative,
            "entries_kept": self.kept,
            "entries": self.numbers,
            "bytes": self.bytes,
        }


def protected(update: Update, defences: Sequence[Defence], seed: int = 0) -> tuple[Update, Left]:
    """Apply defences in their order.

    Args:
        update: What the client computed; it stays as it is.
        defences: What is done, first things first.
        seed: Seed of what they draw.

    Returns:
        What is sent, in whose `defences` the server is told what was done, and what is left.

    Raises:
        UpdateError: A number is larger than any of a rounded type.

    Example:
        >>> update, left = protected(Update({"w": torch.ones(4)}), [Rounding("bfloat16")])
        >>> update.defences, left.bytes
        ('bits=bfloat16', 8)

    Chapter `14_defences`.
    """
    gradients, draw = update.gradients, generator(seed)
    norm, bounded, deviation = length(gradients), None, 0.0
    for defence in defences:
        if isinstance(defence, Noise):
            bounded, deviation = length(gradients), defence.deviation
        gradients = defence(gradients, draw)
    told = ", ".join([*filter(None, [update.defences]), *(defence.told for defence in defences)])
    sent = replace(update, gradients=gradients, defences=told or None)
    bits = min([FULL, *(defence.bits for defence in defences if isinstance(defence, Rounding))])
    kept = sum(int(torch.count_nonzero(tensor)) for tensor in gradients.values())
    return sent, Left(norm, length(gradients) if bounded is None else bounded, deviation, kept, size(gradients), bits)
