"""Clipping: a gradient that is longer than allowed is shortened (chapter `14_defences`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.client.constraints import OneOf, Within, check_options, option

SCOPES = ("update", "tensor")


@dataclass(frozen=True)
class Clipping:
    """Shorten what is longer than a norm; what is shorter stays as it is.

    Attributes:
        norm: The largest length.
        each: What has that length at most: the whole `update`, as most platforms do it, or each `tensor` by itself.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> Clipping(1.0)({"w": torch.tensor([3.0, 4.0])})["w"]
        tensor([0.6000, 0.8000])

    Chapter `14_defences`.
    """

    norm: float = option(1.0, Within(0, whole=False), "The largest length.")
    each: str = option("update", OneOf(SCOPES), "What has that length at most.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)

    @property
    def told(self) -> str:
        """What a server is told."""
        return f"clip={self.norm:g}" + " of each tensor" * (self.each == "tensor")

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """The clipped gradients.

        Args:
            gradients: Tensors by name.
            draw: Not used.
        """
        if self.each == "update":
            return scaled(gradients, self._factor(gradients))
        return {name: tensor * self._factor({name: tensor}) for name, tensor in gradients.items()}

    def _factor(self, gradients: Mapping[str, Tensor]) -> float:
        """What the length is multiplied by: 1 where it is allowed."""
        return min(1.0, self.norm / max(length(gradients), math.ulp(0.0)))


def scaled(gradients: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Every number times one factor.

    Args:
        gradients: Tensors by name.
        factor: The new length over the old one.
    """
    return {name: tensor * factor for name, tensor in gradients.items()}


def length(gradients: Mapping[str, Tensor]) -> float:
    """The length of gradients: the root of the sum of all squares.

    Args:
        gradients: Tensors by name.
    """
    squares = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in gradients.values())
    return math.sqrt(sum(squares))


def size(gradients: Mapping[str, Tensor]) -> int:
    """How many numbers there are.

    Args:
        gradients: Tensors by name.
    """
    return sum(tensor.numel() for tensor in gradients.values())
