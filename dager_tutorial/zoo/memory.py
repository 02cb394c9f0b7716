"""What a model takes in memory, whole or streamed, and which of the two fits, before anything is read."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from dager_tutorial.errors import ModelError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.streaming import RESIDENT_BLOCKS
from dager_tutorial.stopwatch import available_memory
from dager_tutorial.zoo.checkpoint import meta_backbone

SHARE = 0.5
"""Of the memory that is free, what weights may take unasked: gradients and intermediate results need the rest."""

FLOAT32 = 4

RETURNED = 2**20
"""Bytes from which on freed memory goes back to the system at once."""

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass(frozen=True)
class Needs:
    """Bytes that a model's weights take in float32.

    Attributes:
        whole: All of them at once.
        streamed: Embeddings, the first blocks, and one more block, where deeper blocks come and go.
    """

    whole: int
    streamed: int

    @classmethod
    def of(cls, parameters: int, block: int, blocks: int) -> Needs:
        """The needs of a model.

        Args:
            parameters: Number of all its parameters.
            block: Number of parameters of one block.
            blocks: Number of blocks.

        Example:
            >>> Needs.of(parameters=1000, block=100, blocks=9)
            Needs(whole=4000, streamed=1600)
        """
        away = max(0, blocks - RESIDENT_BLOCKS - 1)
        return cls(FLOAT32 * parameters, FLOAT32 * (parameters - away * block))


def needs_of(config: PreTrainedConfig) -> Needs:
    """What a headless model takes, counted without memory for it."""
    network = meta_backbone(config)
    blocks = adapter_for(network).blocks
    block = sum(parameter.numel() for parameter in blocks[-1].parameters())
    return Needs.of(network.num_parameters(), block, len(blocks))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model would lie."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def return_memory() -> None:
    """Let the C library give every large piece of memory back to the system once it is free.

    Left to itself glibc keeps what is below 32 MB, and cannot use aligned pieces again: a streamed network of width
    4096 took 8 GB where it holds 5.
    """
    if sys.platform == "linux":
        adjust = getattr(ctypes.CDLL(None), "mallopt", None)
        if adjust is not None:  # not every C library has it
            adjust(_M_MMAP_THRESHOLD, RETURNED)


def is_large(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether a model takes more than `SHARE` of the memory that is free on a device."""
    limit = SHARE * free_memory(device)
    return _at_most(config) > limit and needs_of(config).whole > limit


def to_be_streamed(name: str, config: PreTrainedConfig, device: torch.device, stream: bool | None) -> bool:
    """Whether a checkpoint is to be streamed.

    Args:
        name: The model's name, for the message.
        config: Its shape.
        device: Where it goes.
        stream: What the user wants; None for streaming where the model takes more than `SHARE` of the free memory.

    Raises:
        ModelError: It fits neither way, or not in the way that the user wants.
    """
    free = free_memory(device)
    chosen = is_large(config, device) if stream is None else stream
    if stream is None and not chosen:
        return False
    wanted = needs_of(config)
    if chosen and wanted.streamed > free:
        raise ModelError(f"{_too_large(name, wanted.streamed, free, ' streamed')}: keep fewer blocks with --blocks")
    if not chosen and wanted.whole > free:
        raise ModelError(f"{_too_large(name, wanted.whole, free)}: use --stream, or keep fewer blocks with --blocks")
    return chosen


def check_drawable(name: str, config: PreTrainedConfig, device: torch.device) -> None:
    """Refuse a random model that does not fit into memory: it is drawn there.

    Args:
        name: The model's name, for the message.
        config: Its shape.
        device: Where it goes.

    Raises:
        ModelError: It does not fit.
    """
    free = min(free_memory(device), free_memory(torch.device("cpu")))
    if _at_most(config) > free and (whole := needs_of(config).whole) > free:
        raise ModelError(
            f"{_too_large(name, whole, free)}: write it once with `dager models export {name} DIR --weights bfloat16` "
            "and use --model DIR, or keep fewer blocks with --blocks"
        )


def _too_large(name: str, bytes_: int, free: int, how: str = "") -> str:
    return f"{name} takes {bytes_ / 1e9:.1f} GB{how} and {free / 1e9:.1f} GB are free"


def _at_most(config: PreTrainedConfig) -> int:
    """A bound on the bytes of a model, read off its configuration in no time."""
    width = config.hidden_size
    inner = max(getattr(config, name, None) or 4 * width for name in ("intermediate_size", "hidden_dim", "n_inner"))
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
    tables = config.vocab_size + (getattr(config, "max_position_embeddings", None) or 0) + 16
    block = 4 * width * max(width, heads) + 3 * width * inner + 32 * max(width, inner)
    return FLOAT32 * (tables * width + config.num_hidden_layers * block + 2 * width * width)
