"""A tap: a point of the network whose vectors enter linear maps, and the address of everything that is read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

QKV = "query, key, value"
QUERY = "query"
ATTENTION_OUTPUT = "attention output"
MLP = "MLP"
MLP_OUTPUT = "MLP output"
KINDS = (QKV, ATTENTION_OUTPUT, MLP)  # QUERY is a part of the first; MLP_OUTPUT has inputs wider than the model


@dataclass(frozen=True)
class Tap:
    """A point of the network whose vectors enter one or several linear maps.

    Attributes:
        block: Index of the transformer block, from 0.
        kind: One of `KINDS`, or `QUERY`.
        parameters: Names of the linear maps' weights in the backbone's `named_parameters()`.
        input_first: True where the weight is stored inputs x outputs (the Conv1D of GPT-2).
        outputs: How many of the first parameter's outputs count, where a fused map holds more than the kind.

    Example:
        >>> tap = Tap(0, QKV, ("h.0.attn.c_attn.weight",), input_first=True)
        >>> tap.name, tap.gradient({"h.0.attn.c_attn.weight": torch.ones(4, 12)}).shape
        ('block 0 query, key, value', torch.Size([12, 4]))
    """

    block: int
    kind: str
    parameters: tuple[str, ...]
    input_first: bool = False
    outputs: int | None = None

    @property
    def name(self) -> str:
        """A label for people, `block 0 query, key, value` for one."""
        return f"block {self.block} {self.kind}"

    def gradient(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, "outputs inputs"] | None:
        """Stack the gradients of the tap's linear maps that were shared (chapter `03_span`).

        Args:
            gradients: Gradients by backbone parameter name.

        Returns:
            float64, every row a combination of the tap's input vectors; None where none is shared.
        """
        shared = [precise(gradients[name]) for name in self.parameters if name in gradients]
        if not shared:
            return None
        return torch.cat([weight.T if self.input_first else weight for weight in shared])[: self.outputs]


NO_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64: Apple's."""


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64; what needs it is computed on the CPU otherwise."""
    return device.type not in NO_FLOAT64


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the CPU where the device has none."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()
