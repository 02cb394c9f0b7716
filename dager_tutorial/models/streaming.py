"""Models larger than memory: the matrices of deeper blocks are read when they are used, and given up afterwards.

A streamed network is the unmodified transformers model. Hooks on its linear maps put a matrix in memory before the map
runs and take it out behind it; embeddings, norms, biases and the first blocks, which the attack calls piece by piece,
stay. A parameter keeps its identity, shape, dtype and device all the time: while its numbers are out it is a single
NaN, repeated without memory, so that nothing can be computed from it in silence.

Numbers that lie in a file as bfloat16 are read as bfloat16 and become what the parameter is, float32 as a rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dager_tutorial.errors import ModelError, quote

RESIDENT_BLOCKS = 2
"""How many of the first blocks stay in memory: those that the attack tests prefixes with."""

PASSES_IN_ONE = 4
"""How many passes a streamed network makes at once: 8192 tokens are 0.36 GB in the widest maps of Llama-2-7B."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        path: The file.
        key: The tensor's name in it.
    """

    path: Path
    key: str

    def read(self) -> Tensor:
        """The tensor on the CPU, in the file's dtype.

        Raises:
            ModelError: The file is gone or has changed since it was looked at.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.key)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read {quote(self.key)} from {self.path} ({error}): copy the file again"
            ) from error

    def put(self, parameter: Tensor) -> None:
        """Give a parameter its numbers, in its own dtype and on its own device."""
        parameter.data = self.read().to(parameter.device, parameter.dtype)


@dataclass(frozen=True)
class Streamed:
    """The matrices of one module that come and go with each call; a copy of the module in another dtype may use it.

    Attributes:
        matrices: Where each of them lies, by its name in the module.
    """

    matrices: Mapping[str, Stored]

    def fetch(self, module: nn.Module, _: Any) -> None:
        """Put the matrices in memory: what runs before the module."""
        for name, stored in self.matrices.items():
            stored.put(getattr(module, name))

    def release(self, module: nn.Module, *_: Any) -> None:
        """Take the matrices out of memory: what runs behind the module, whatever happened in it."""
        for name in self.matrices:
            parameter = getattr(module, name)
            parameter.data = absent(parameter)


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for numbers that are not in memory: one NaN, seen everywhere.

    Args:
        like: Has the shape and the device.
        dtype: The dtype; None for that of `like`.
    """
    return torch.full((), math.nan, dtype=dtype or like.dtype, device=like.device).expand(like.shape)


def is_absent(tensor: Tensor) -> bool:
    """Whether a matrix is out of memory (or has one number only, which amounts to the same)."""
    return tensor.dim() > 1 and not any(tensor.stride())


def stream(block: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Let the matrices of a block come and go; its vectors, norms and biases, are left as they are.

    Args:
        block: The block. Its matrices are given up at once.
        stored: Where they lie, by their names in the block.
    """
    for path, module in block.named_modules():
        own = dict(module.named_parameters(prefix=path, recurse=False))
        matrices = {name: stored[name] for name, parameter in own.items() if parameter.dim() > 1}
        if matrices:
            streamed = Streamed({name.rpartition(".")[2]: place for name, place in matrices.items()})
            streamed.release(module)
            module.register_forward_pre_hook(streamed.fetch)
            module.register_forward_hook(streamed.release, always_call=True)


def is_streamed(network: nn.Module) -> bool:
    """Whether a network has matrices that come and go. Ask while none of it runs."""
    return any(is_absent(parameter) for parameter in network.parameters())


def tokens_at_once(network: nn.Module, usual: int) -> int:
    """How many tokens go through a network in one pass: more where each pass reads the blocks anew.

    Args:
        network: The network.
        usual: How many do where it is in memory.
    """
    return PASSES_IN_ONE * usual if is_streamed(network) else usual


def resident_blocks(blocks: nn.ModuleList) -> int:
    """How many of the blocks have a matrix in memory.

    Args:
        blocks: Blocks of a network.
    """
    return sum(any(p.dim() > 1 and not is_absent(p) for p in block.parameters()) for block in blocks)


@contextmanager
def recomputed(network: PreTrainedModel) -> Iterator[None]:
    """Let a backward pass run block by block: only what enters a block is kept, the rest is computed once more.

    This is gradient checkpointing as transformers has it, without what it ties to it: dropout stays off.

    Args:
        network: A network in evaluation mode.
    """
    blocks: list[Any] = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    try:
        for block in blocks:
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            block.gradient_checkpointing = block.training = True  # of the block alone: only its parts have dropout
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = block.training = False
