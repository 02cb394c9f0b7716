"""From gradients in logits to labels, counts and the size of the batch: whole numbers.

The cross-entropy's gradient in a text's logits is `(p - e_label) / B`. A text that occurs m times, with each label as
often as `counts` says, has `v = (m p - counts) / B`: both m and the counts follow, once B is known; and B is the least
number that makes all of them whole.

Chapter `09_completion`.
"""

from __future__ import annotations

import math
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
            return found if found.complete or len(gradients) < least else _filled(gradients, found, error)
    return None


def trials(least: int) -> Iterator[tuple[float, int]]:
    """Errors of counts and sizes of batches in the order in which they are tried: the finest error first.

    Args:
        least: As many texts as there are at least.
    """
    error = constants().finest_count
    while error < constants().coarsest_count:
        for size in range(least, constants().most_copies * least + 1):
            yield error, size
        error *= constants().coarser


def count_within(
    gradients: Float[Tensor, "texts classes"], chances: Float[Tensor, "texts classes"], size: int, error: float
) -> Counts | None:
    """The whole numbers behind gradients in logits, for one size of the batch: of those that fit the least.

    Args:
        gradients: float64, measured.
        chances: float64, the probabilities of the classes.
        size: The number of texts in the batch.
        error: How far a count may be from whole where every text occurs once.

    Returns:
        None where not all counts are whole, or where chance alone would make them so. Of counts that are complete, the
        least that have the same shares: where more texts were expected than there are, noise was taken for texts.
    """
    whole, fits = _candidates(size * gradients, chances, size, error)
    if not fits.any(0).all():
        return None
    least = fits.int().argmax(0)
    labels = whole[least, torch.arange(len(gradients))]
    chance = size * _chance(least, _allowed(gradients, size, error), gradients.shape[1])
    if labels.sum() > size or chance > constants().chance_counts:
        return None
    divisor = math.gcd(size, *labels.flatten().tolist()) if labels.sum() == size else 1
    return Counts(size // divisor, labels // divisor, chances)


def _candidates(scaled: Tensor, chances: Tensor, size: int, error: float) -> tuple[Tensor, Tensor]:
    """Whole counts for each number of copies (copies x texts x classes), and whether they fit."""
    copies = torch.arange(1, min(size, constants().most_copies) + 1)[:, None, None]
    wanted = copies * chances - scaled
    whole = wanted.round()
    fits = ((wanted - whole).abs() <= _allowed(scaled, size, error)).all(2) & (whole >= 0).all(2)
    return whole.long(), fits


def _allowed(scaled: Tensor, size: int, error: float) -> float:
    """How far a count may be from whole: errors grow with the size, but never so far that any number would be whole."""
    return min(error * size / len(scaled), constants().coarsest_count)


def _chance(least: Tensor, allowed: float, classes: int) -> float:
    """How likely numbers that mean nothing are whole with so many copies of each text (less one), or fewer."""
    return ((least + 1) * (2 * allowed) ** (classes - 1)).clamp(max=1.0).prod().item()


def _filled(gradients: Tensor, found: Counts, error: float) -> Counts:
    """Counts that add up to the size, where no text can be missing and the least that fit do not.

    One of each class more is invisible where all classes are equally likely. If there is just one way to choose counts
    that fit and add up, it is taken; else nobody can tell, and the counts stay incomplete.
    """
    whole, fits = _candidates(found.size * gradients, found.chances, found.size, error)
    ways: dict[int, list[list[int]]] = {0: [[]]}  # copies so far: choices that lead there, two at most
    for text in range(len(gradients)):
        longer: dict[int, list[list[int]]] = {}
        for copies in (fits[:, text].nonzero()[:, 0] + 1).tolist():
            for total, chosen in ways.items():
                if total + copies <= found.size:
                    longer.setdefault(total + copies, []).extend([*each, copies] for each in chosen)
        ways = {total: chosen[:2] for total, chosen in longer.items()}
    chosen = ways.get(found.size, [])
    if len(chosen) != 1:
        return found
    labels = whole[torch.tensor(chosen[0]) - 1, torch.arange(len(gradients))]
    return Counts(found.size, labels, found.chances)
