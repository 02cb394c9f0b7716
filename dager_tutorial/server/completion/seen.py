"""What a gradient shows of a map to the classes, and what it cannot show.

The numbers of the map reach the gradient through the slopes of its features alone. A layer norm has one direction that
never moves, whatever the text: along it the map is invisible, and all that it adds to a logit is one offset a class.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants


@dataclass(frozen=True)
class Seen:
    """The directions of features, as texts move them.

    Attributes:
        whitened: float64, as columns: in these coordinates the slopes of all texts together are equally strong.
        hidden: float64, as columns: directions that no text moves.
        slopes: float64, the slopes in whitened coordinates.
    """

    whitened: Float[Tensor, "features seen"]
    hidden: Float[Tensor, "features hidden"]
    slopes: Float[Tensor, "texts seen width"]


def seen_through(slopes: Float[Tensor, "texts features width"]) -> Seen:
    """Whiten the slopes of features.

    Args:
        slopes: Of each text.
    """
    strength = sum((precise(slope) @ precise(slope).T for slope in slopes), torch.zeros(()))
    values, vectors = torch.linalg.eigh(strength)
    kept = values > constants().unseen * values[-1]
    whitened = vectors[:, kept] / values[kept].sqrt()
    return Seen(whitened, vectors[:, ~kept], torch.stack([whitened.T @ precise(slope) for slope in slopes]))


def map_from(
    seen: Seen, logits: Float[Tensor, "texts classes"], outputs: Float[Tensor, "texts width"]
) -> Float[Tensor, "classes features"]:
    """The map of which `outputs = logits @ map @ slopes`, least in norm: least squares by conjugate gradients.

    Args:
        seen: Directions and slopes.
        logits: float64, the loss's gradients in the logits.
        outputs: float64, its gradients at the last block's MLP output.
    """
    left, strengths, right = torch.linalg.svd(logits, full_matrices=False)
    kept = strengths > constants().unseen ** 0.5 * strengths[0]  # of C classes C - 1: a logit gradient sums to zero
    left = left[:, kept]
    squares = seen.slopes @ seen.slopes.mT

    def normal(mixed: Tensor) -> Tensor:
        return left.T @ torch.einsum("bs,bst->bt", left @ mixed, squares)

    wanted = left.T @ torch.einsum("bsw,bw->bs", seen.slopes, outputs)
    mixed = _conjugate(normal, wanted)
    return right[kept].T @ (mixed / strengths[kept, None]) @ seen.whitened.T


def _conjugate(normal: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Solve a symmetric positive system by conjugate gradients."""
    found, rest = torch.zeros_like(wanted), wanted
    along, size = rest, rest.square().sum()
    enough = 1e-24 * size
    for _ in range(constants().most_conjugate):
        if size <= enough:
            break
        image = normal(along)
        step = size / (along * image).sum()
        found, rest = found + step * along, rest - step * image
        before, size = size, rest.square().sum()
        along = rest + size / before * along
    return found
