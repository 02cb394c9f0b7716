"""Quantisation: numbers with fewer bits (chapter `14_defences`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.client.constraints import OneOf, Within, check_options, option

BITS = {"bfloat16": 16, "float16": 16, "int8": 8, "sign": 1}
STEPS = 127
"""Steps from 0 to the largest number that int8 has, the same on both sides."""


@dataclass(frozen=True)
class Rounding:
    """Round every number of the gradients to a narrower type.

    Attributes:
        to: `bfloat16` and `float16`; `int8`, with 127 even steps to each tensor's largest magnitude; or `sign`, times
            the mean magnitude of the tensor. Zero stays zero.
        stochastic: Whether `int8` rounds up or down by chance, right on average, instead of to the nearest step.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> Rounding("sign")({"w": torch.tensor([1.0, -3.0])})["w"]
        tensor([ 2., -2.])

    Chapter `14_defences`.
    """

    to: str = option("int8", OneOf(tuple(BITS)), "The type.")
    stochastic: bool = option(False, Within(0, 1), "Whether int8 rounds up or down by chance.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return BITS[self.to]

    @property
    def told(self) -> str:
        """What a server is told."""
        return f"bits={self.to}" + " stochastic" * self.stochastic

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """The rounded gradients.

        Args:
            gradients: Tensors by name.
            draw: What stochastic rounding draws from.

        Returns:
            Of the type, or float32 for `int8` and `sign`, as the receiver spells them out.
        """
        return {name: self._rounded(tensor, draw) for name, tensor in gradients.items()}

    def _rounded(self, tensor: Tensor, draw: torch.Generator | None) -> Tensor:
        if self.to == "sign":
            return tensor.float().sign() * tensor.float().abs().mean()
        if self.to != "int8":
            return tensor.to(getattr(torch, self.to))
        step = tensor.abs().max().float().clamp(min=torch.finfo(torch.float32).tiny) / STEPS
        places = tensor.float() / step
        if self.stochastic:
            return (places + torch.rand(places.shape, generator=draw)).floor().clamp(-STEPS, STEPS) * step
        return places.round() * step
