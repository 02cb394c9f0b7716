"""Each text's own share of a sum, whatever the other texts are: rank reduction.

Where a loss reads one token of each text, the gradient of the last block's attention output map is
`M = sum_b a_b^T u_b`: one term a text, a_b the known input of the map at that token, u_b the unknown gradient at its
output. (So is that of the MLP's output map. Activations are more alike than what attention gathers: there errors are
ten times larger.) Where the a_b are independent and the u_b are,
`u_b M^+ a_b'^T` is 1 for b = b' and 0 for others (Wedderburn 1934; Chu, Funderlic, Golub, SIAM Review 1995). The server
knows the direction of u_b, and so its length, without knowing a single one of the other texts.

Chapter `09_completion`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dager_tutorial.server.completion.simulation import Factors
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decomposition import signal_of


@dataclass(frozen=True)
class Reduction:
    """The map's gradient, taken apart.

    Attributes:
        inputs: float64, its directions among the map's inputs, as columns.
        outputs: float64, its directions among the map's outputs, scaled to equal noise.
        strengths: float64, singular values.
        scales: float64, what each output is divided by; infinite where the gradient is zero.
        error: Relative error of a direction: how far vectors of the batch may lie outside.
        clear: Whether a gap that noise does not make stands below the last direction, so that there are as many terms.
    """

    inputs: Float[Tensor, "inner rank"]
    outputs: Float[Tensor, "width rank"]
    strengths: Float[Tensor, " rank"]
    scales: Float[Tensor, " width"]
    error: float
    clear: bool

    @property
    def least(self) -> int:
        """How many texts there are at least."""
        return len(self.strengths) if self.clear else 1


@dataclass(frozen=True)
class Shares:
    """What the loss has as gradient in the logits of some texts.

    Attributes:
        gradients: float64, class by class.
        inside: Whether the text's vectors lie in the map's gradient at all: no other text can be in the batch.
    """

    gradients: Float[Tensor, "texts classes"]
    inside: Bool[Tensor, " texts"]


def reduction_of(gradient: Float[Tensor, "width inner"], precision: float) -> Reduction | None:
    """Take the gradient of a map apart.

    Args:
        gradient: float64, the map's gradient, outputs x inputs.
        precision: Machine epsilon of the type in which it was stored.

    Returns:
        None where it holds nothing but noise.
    """
    scales = gradient.norm(dim=1)
    scales = torch.where(scales > 0, scales, torch.inf)
    scaled = gradient / scales[:, None]
    found = signal_of(scaled, precision)
    if not len(found.values):
        return None
    outputs = scaled @ found.directions / found.values
    clear = found.values[-1].item() >= constants().clear_gap * found.tail.largest
    return Reduction(found.directions, outputs, found.values, scales, precision**0.5, clear)


def shares(reduction: Reduction, factors: Factors) -> Shares:
    """The gradients in the logits of texts, each from the sum alone.

    A logit gradient sums to zero over the classes, so that u_b is a combination of differences of slopes: of two
    classes just one; of more, the one that lies in the map's gradient. Its length follows from the pairing with a_b.

    Args:
        reduction: The map's gradient.
        factors: What the texts add to it, up to the gradients in their logits.

    Example:
        >>> a, y = torch.eye(30, dtype=torch.float64)[:2], torch.eye(40, dtype=torch.float64)[:2]
        >>> slopes = torch.stack([torch.zeros_like(y), y], 1)  # of two classes
        >>> gradient = y.T @ torch.diag(torch.tensor([0.5, -0.25], dtype=torch.float64)) @ a
        >>> shares(reduction_of(gradient, 2.0**-23), Factors(a, slopes, slopes.new_full((2, 2), 0.5))).gradients[:, 1]
        tensor([ 0.5000, -0.2500], dtype=torch.float64)
    """
    contrasts = factors.contrasts / reduction.scales
    inside = contrasts @ reduction.outputs
    outside = contrasts - inside @ reduction.outputs.T
    paired = (factors.inputs @ reduction.inputs) / reduction.strengths
    found = [_share(*each) for each in zip(contrasts, inside, outside, paired, strict=True)]
    gradients = torch.stack([gradient for gradient, _ in found])
    away = torch.tensor([rest for _, rest in found], dtype=torch.float64)
    far = factors.inputs - (factors.inputs @ reduction.inputs) @ reduction.inputs.T
    held = far.norm(dim=1) <= reduction.error * factors.inputs.norm(dim=1)
    return Shares(_with_the_first(gradients), held & (away <= reduction.error))


def shares_of_all(
    gradient: Float[Tensor, "width inner"], factors: Factors, precision: float
) -> Float[Tensor, "texts classes"] | None:
    """The gradients in the logits of all texts of a batch, by least squares.

    With no text missing this is finer than `shares`, above all for a text that occurs with several labels: what it adds
    is so little that its direction is noise, while here its error is absolute, as small as any other's.

    Args:
        gradient: float64, the map's gradient, outputs x inputs.
        factors: What the texts add to it, up to the gradients in their logits.
        precision: Machine epsilon of the type in which the gradient was stored.

    Returns:
        None where the texts do not add up to the gradient: some are missing.
    """
    if len(factors.inputs) > min(gradient.shape):
        return None
    outputs = torch.linalg.lstsq(factors.inputs.T, gradient.T).solution
    if (gradient - outputs.T @ factors.inputs).norm() > precision**0.5 * gradient.norm():
        return None
    return _with_the_first(torch.linalg.lstsq(factors.contrasts.mT, outputs[..., None]).solution[..., 0])


def _with_the_first(others: Tensor) -> Tensor:
    """Gradients in all logits, of those in all but the first: together they are zero."""
    return torch.cat([-others.sum(1, keepdim=True), others], 1)


def _share(contrasts: Tensor, inside: Tensor, outside: Tensor, paired: Tensor) -> tuple[Tensor, float]:
    """Gradients in all logits but the first of one text, and how far their direction lies outside the map's."""
    size = contrasts.norm()
    mix = contrasts.new_ones(1)
    if len(contrasts) > 1:
        # The combination that lies inside: the least singular vector of what is outside.
        mix = torch.linalg.svd(outside.T / size, full_matrices=False).Vh[-1]
    away = (mix @ outside).norm() / (mix @ contrasts).norm().clamp(min=1e-300)
    length = mix @ inside @ paired
    return mix / length.where(length != 0, torch.inf), away.item()
