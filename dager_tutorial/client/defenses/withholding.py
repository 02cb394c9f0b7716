"""Not sharing: some tensors stay with the client, as where they are frozen (chapter `11_limits`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Withholding:
    """Send some tensors, and keep the others.

    Attributes:
        names: Those that are sent.
        told: What a server is told: which these are, in a few words.

    Example:
        >>> list(Withholding(frozenset({"b"}), "biases alone")({"w": torch.ones(2), "b": torch.ones(1)}))
        ['b']

    Chapter `11_limits`.
    """

    names: frozenset[str]
    told: str

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """The gradients that are sent.

        Args:
            gradients: Tensors by name.
            draw: Not used.
        """
        return {name: tensor for name, tensor in gradients.items() if name in self.names}
