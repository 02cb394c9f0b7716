"""What whole numbers say of a head: the scale of its map, and one offset a class.

The gradient fixes `v_b`, the loss's gradient in the logits of text b, or `s v_b` with one unknown s, and the logits up
to an offset. But `size * v_b = copies * chances - counts`, and only the right numbers make all counts whole.

Chapter `09_completion`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.completion.counting import Counts, count_within, trials
from dager_tutorial.server.constants import constants


@dataclass(frozen=True)
class Settled:
    """What makes all counts whole.

    Attributes:
        counts: Labels and copies of all texts, and the size: no text is missing.
        scale: By how much the map has to be multiplied.
        offset: float64, what is added to each class's logit.
    """

    counts: Counts
    scale: float
    offset: Float[Tensor, " classes"]


def settle_offset(
    gradients: Float[Tensor, "texts classes"], logits: Float[Tensor, "texts classes"], *, free: bool
) -> Settled | None:
    """Find what is added to the logits of all texts, and the counts.

    Args:
        gradients: float64, the loss's gradients in the logits.
        logits: float64, up to an offset for each class.
        free: Whether the head can add one.

    Returns:
        None where no offset makes all counts whole and complete.

    Example:
        >>> chances = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
        >>> gradients = (chances - torch.eye(2, dtype=torch.float64)) / 2
        >>> settle_offset(gradients, chances.log() + torch.tensor([0.0, 1.0]), free=True).offset
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    for error, size in trials(len(gradients)):
        for offset in _offsets(size * gradients, logits, free):
            found = count_within(gradients, (logits + offset).softmax(1), size, error)
            if found is not None and found.complete:
                offset = _refined_offset(gradients, logits, found, offset) if free else offset
                counts = Counts(size, found.labels, (logits + offset).softmax(1))
                return Settled(counts, 1.0, offset)
    return None


def _offsets(scaled: Tensor, logits: Tensor, free: bool) -> list[Tensor]:
    """Offsets to try for a size: none, and what each of a few texts tells if it occurs once."""
    found = [logits.new_zeros(logits.shape[1])]
    for wanted, own in zip(scaled[: constants().tellers], logits, strict=False) if free else ():
        chances = wanted.clone()
        chances[wanted.argmin()] += 1
        if chances.min() > 0:
            offset = chances.log() - own
            found.append(offset - offset.mean())
    return found


def _refined_offset(gradients: Tensor, logits: Tensor, counts: Counts, offset: Tensor) -> Tensor:
    """The offset that fits all texts best, by Newton's method: the counts are known."""
    copies = counts.labels.sum(1, keepdim=True)
    wanted = counts.size * gradients + counts.labels
    for _ in range(constants().newton_steps):
        chances = (logits + offset).softmax(1)
        curve = torch.diag((copies * chances).sum(0)) - (copies * chances).T @ chances
        offset = offset + torch.linalg.pinv(curve, hermitian=True) @ (wanted - copies * chances).sum(0)
    return offset - offset.mean()


def settle_scale(shares: Float[Tensor, " texts"], scores: Float[Tensor, " texts"], *, free: bool) -> Settled | None:
    """Find the scale of a map to two classes, and the counts.

    Args:
        shares: float64, for each text the gradient in the second logit, times the scale.
        scores: float64, difference of its logits, over the scale.
        free: Whether the head can add an offset.

    Returns:
        None where no scale makes all counts whole and complete.

    Example:
        >>> scores = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
        >>> chances = (0.5 * scores).sigmoid()
        >>> settle_scale(0.5 * (chances - torch.tensor([1, 0, 1])) / 3, scores, free=False).scale
        0.5...
    """
    for error, size in trials(len(shares)):
        for scale, offset in _scales(size * shares, scores, free):
            chances = _two(scale * scores + offset)
            found = count_within(_two_gradients(shares / scale), chances, size, error)
            if found is not None and found.complete:
                scale, offset = _refined_scale(size * shares, scores, found.labels, (scale, offset), free)
                counts = Counts(size, found.labels, _two(scale * scores + offset))
                return Settled(counts, scale, torch.tensor([-offset / 2, offset / 2], dtype=torch.float64))
    return None


def _two(margins: Tensor) -> Tensor:
    """Probabilities of two classes."""
    return torch.stack([(-margins).sigmoid(), margins.sigmoid()], 1)


def _two_gradients(second: Tensor) -> Tensor:
    return torch.stack([-second, second], 1)


def _scales(shares: Tensor, scores: Tensor, free: bool) -> list[tuple[float, float]]:
    """Scales and offsets to try for a size: as if the middle text occurred once, twice, ...; as if all did once."""
    found = []
    for copies in range(1, constants().tellers + 1):
        scale = shares.abs().median() * 2 / copies
        for _ in range(constants().newton_steps):
            others = torch.where(shares < 0, -1, 1) * scale * scores  # margin of the class that is not the label
            scale = (shares.abs() / others.sigmoid()).median() / copies
        found.append((scale.item(), 0.0))
    once = torch.stack([shares > 0, shares < 0], 1).long()
    return [*found, _refined_scale(shares, scores, once, found[0], free)] if free else found


def _refined_scale(
    shares: Tensor, scores: Tensor, labels: Tensor, start: tuple[float, float], free: bool
) -> tuple[float, float]:
    """Scale and offset that fit all texts best, by the Gauss-Newton method: the counts are known."""
    copies, seconds = labels.sum(1), labels[:, 1]
    scale, offset = start
    for _ in range(constants().newton_steps):
        chances = (scale * scores + offset).sigmoid()
        rest = shares / scale + seconds - copies * chances
        curve = copies * chances * (1 - chances)
        columns = torch.stack([curve * scores + shares / scale**2, curve], 1)[:, : 2 if free else 1]
        change = (torch.linalg.pinv(columns) @ rest).tolist()
        scale, offset = abs(scale + change[0]), offset + (change[1] if free else 0.0)
    return scale, offset
