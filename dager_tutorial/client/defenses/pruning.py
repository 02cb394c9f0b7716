"""Pruning: most entries of a gradient are set to zero, and so need not be sent (chapter `11_limits`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dager_tutorial.client.constraints import OneOf, Within, check_options, option

CHOICES = ("magnitude", "random")
SCOPES = ("tensor", "update")


@dataclass(frozen=True)
class Pruning:
    """Keep some entries, and set the others to zero.

    Attributes:
        keep: Entries kept, in per cent; at least one is.
        by: Which: those of largest `magnitude`, or some at `random`. Nothing of what is dropped is remembered for later
            steps (no error feedback).
        each: Of what: of each `tensor`, or of the whole `update`, so that tensors with small entries lose more.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> Pruning(50)({"w": torch.tensor([1.0, -3.0, 2.0, 0.5])})["w"]
        tensor([ 0., -3.,  2.,  0.])

    Chapter `11_limits`.
    """

    keep: float = option(10.0, Within(1e-6, 100, whole=False), "Entries kept, in per cent.")
    by: str = option("magnitude", OneOf(CHOICES), "Which entries are kept.")
    each: str = option("tensor", OneOf(SCOPES), "Of what.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)

    @property
    def told(self) -> str:
        """What a server is told."""
        return f"keep={self.keep:g}% by {self.by}" + " of the update" * (self.each == "update")

    def count(self, numbers: int) -> int:
        """How many of so many entries are kept.

        Args:
            numbers: Of a tensor.

        Example:
            >>> Pruning(1).count(768), Pruning(1).count(10)
            (8, 1)
        """
        return max(1, math.ceil(numbers * self.keep / 100))

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """The pruned gradients.

        Args:
            gradients: Tensors by name.
            draw: What random choices come from.
        """
        if self.each == "tensor":
            return {name: self._pruned(tensor, draw) for name, tensor in gradients.items()}
        joined = self._pruned(torch.cat([tensor.reshape(-1) for tensor in gradients.values()]), draw)
        parts = joined.split([tensor.numel() for tensor in gradients.values()])
        return {name: part.reshape(gradients[name].shape) for name, part in zip(gradients, parts, strict=True)}

    def _pruned(self, tensor: Tensor, draw: torch.Generator | None) -> Tensor:
        flat, kept = tensor.reshape(-1), self.count(tensor.numel())
        if self.by == "random":
            places = torch.randperm(len(flat), generator=draw)[:kept]
        else:
            places = flat.abs().topk(kept, sorted=False).indices
        result = torch.zeros_like(flat)
        result[places] = flat[places]
        return result.reshape(tensor.shape)


@dataclass(frozen=True)
class PercentileFilter:
    """What NVFLARE's `PercentilePrivacy` does, at its defaults: drop the smallest entries, cut the largest.

    Attributes:
        percentile: The share of the smallest entries that is dropped, in per cent, over all tensors together.
        gamma: The largest magnitude; larger entries are cut to it. In NVFLARE it is meant for weight differences: a
            gradient may be much larger.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> PercentileFilter()({"w": torch.tensor([0.001, -0.005, 0.5])})["w"]
        tensor([ 0.0000, -0.0050,  0.0100])

    Chapter `11_limits`.
    """

    percentile: float = option(10.0, Within(0, 100, whole=False), "Share of the smallest entries that is dropped.")
    gamma: float = option(0.01, Within(1e-12, whole=False), "The largest magnitude.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)

    @property
    def told(self) -> str:
        """What a server is told."""
        return f"percentile={self.percentile:g}% gamma={self.gamma:g}"

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """The filtered gradients.

        Args:
            gradients: Tensors by name.
            draw: Not used.
        """
        sizes = np.concatenate([tensor.float().abs().reshape(-1).numpy() for tensor in gradients.values()])
        cutoff = float(np.percentile(sizes, self.percentile))
        return {
            name: tensor.masked_fill(tensor.float().abs() < cutoff, 0.0).clamp(-self.gamma, self.gamma)
            for name, tensor in gradients.items()
        }
