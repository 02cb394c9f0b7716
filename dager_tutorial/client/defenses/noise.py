"""Gaussian noise of one deviation on every number (chapter `14_defences`).

Noise alone promises nothing about a single text. What promises something is `client.private`: noise behind the clipping
of each text's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.client.constraints import Within, check_options, option

SEED = 1_618_033_988
"""Added to every seed of a defence, so that none is one from which the attack draws: such noise would be measured
wrongly."""


def generator(seed: int) -> torch.Generator:
    """What a defence draws from.

    Args:
        seed: The client's seed.
    """
    return torch.Generator().manual_seed((SEED + seed) % 2**63)


@dataclass(frozen=True)
class Noise:
    """Independent Gaussian noise on every number.

    Attributes:
        deviation: Its standard deviation, in the unit of the gradients: what the DAGER paper calls sigma.

    Raises:
        DagerError: The deviation is negative or not finite.

    Example:
        >>> noised = Noise(1e-3)({"w": torch.zeros(10_000)}, generator(0))["w"]
        >>> round(float(noised.std()) * 1e3, 1)
        1.0

    Chapter `14_defences`.
    """

    deviation: float = option(1e-4, Within(0, whole=False), "Standard deviation.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)

    @property
    def told(self) -> str:
        """What a server is told."""
        return f"noise={self.deviation:g}"

    def __call__(self, gradients: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        """The gradients with noise.

        Args:
            gradients: Tensors by name.
            draw: Where the noise comes from.

        Returns:
            float32, float64 where the gradients are.
        """
        return {name: self._noised(tensor, draw) for name, tensor in gradients.items()}

    def _noised(self, tensor: Tensor, draw: torch.Generator) -> Tensor:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        return torch.randn(tensor.shape, generator=draw, dtype=wide).mul_(self.deviation).add_(tensor)
