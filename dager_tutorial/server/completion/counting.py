"""From gradients in logits to labels, counts and the size of the batch: whole numbers (chapter `09_completion`).

The cross-entropy's gradient in a text's logits is `(p - e_label) / B`. A text that occurs m times, with each label as
often as `counts` says, has `v = (m p - counts) / B`: both m and the counts follow, once B is known; and B is the least
number that makes all of them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.constants import constants


@dataclass(frozen=True)
class Counts:
    """How often each text stands in the batch, label by label.

    Attributes:
        size: The number of texts in the batch, or a part of it that divides all counts: a mean cannot tell.
        labels: int64, for each text how often it occurs with each label.
        chances: float64, the probabilities that the model gives the classes.
    """

    size: int
    labels: Int[Tensor, "texts classes"]
    chances: Float[Tensor, "texts classes"]

    @cached_property
    def copies(self) -> list[int]:
        """How often each text occurs."""
        return self.labels.sum(1).tolist()

    @property
    def complete(self) -> bool:
        """Whether the counts add up to the size: no text is missing."""
        return sum(self.copies) == self.size

    @property
    def gradients(self) -> Float[Tensor, "texts classes"]:
        """What the loss has as gradient in the logits of each text, exactly (float64)."""
        return (self.labels.sum(1, keepdim=True) * self.chances - self.labels) / self.size


def count(
    gradients: Float[Tensor, "texts classes"], chances: Float[Tensor, "texts classes"], *, least: int
) -> Counts | None:
    """The whole numbers behind gradients in logits.

    Args:
        gradients: float64, measured.
        chances: float64, the probabilities of the classes.
        least: As many texts as there are at least.

    Returns:
        None where no size up to a few times the least makes all counts whole.

    Example:
        >>> chances = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
        >>> counts = torch.tensor([[0, 2], [1, 0]])
        >>> found = count((counts.sum(1, keepdim=True) * chances - counts) / 3, chances, least=2)
        >>> found.size, found.labels.tolist(), found.complete
        (3, [[0, 2], [1, 0]], True)
    """
    for error, size in trials(least):
        found = count_within(gradients, chances, size, error)
        if found is not None:
            return found
    return None


def trials(least: int) -> Iterator[tuple[float, int]]:
    """Errors of counts and sizes of batches in the order in which they are tried: the finest error first.

    Args:
        least: As many texts as there are at least.
    """
    for error in (constants().finest_count, constants().coarsest_count):
        for size in range(least, constants().most_copies * least + 1):
            yield error, size


def count_within(
    gradients: Float[Tensor, "texts classes"], chances: Float[Tensor, "texts classes"], size: int, error: float
) -> Counts | None:
    """The whole numbers behind gradients in logits, for one size of the batch.

    Args:
        gradients: float64, measured.
        chances: float64, the probabilities of the classes.
        size: The number of texts in the batch.
        error: How far a count of one copy may be from whole.

    Returns:
        None where not all counts are whole.
    """
    labels = _labels(size * gradients, chances, size, error)
    return None if labels is None else Counts(size, labels, chances)


def _labels(scaled: Tensor, chances: Tensor, size: int, error: float) -> Tensor | None:
    """For a size the least counts (texts x classes) that fit, or None where those of a text do not."""
    found = torch.full(scaled.shape, -1, dtype=torch.long)
    open_ones = torch.ones(len(scaled), dtype=torch.bool)
    for copies in range(1, min(size, constants().most_copies) + 1):
        wanted = copies * chances - scaled
        whole = wanted.round()
        fits = ((wanted - whole).abs() <= error * copies).all(1) & (whole >= 0).all(1)
        fresh = fits & open_ones
        found[fresh] = whole[fresh].long()
        open_ones &= ~fits
        if not open_ones.any():
            return found if found.sum() <= size else None
    return None
