"""Random weights of any size, drawn one module at a time and written as shards: no model is ever in memory whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dager_tutorial.errors import ModelError
from dager_tutorial.zoo.checkpoint import INDEX, meta_backbone, seeded

SHARD = 2**30
"""Bytes after which a shard is closed."""

IN_PARTS = ("llama", "mistral", "qwen2", "smollm3", "bert", "distilbert", "roberta")
"""Families whose initial weights depend on one module at a time, so that drawing in parts gives the same numbers."""


def write_random(config: PreTrainedConfig, seed: int, folder: Path, dtype: torch.dtype) -> None:
    """Write configuration and weights of a random model: those of `random_backbone`, rounded to a dtype.

    Args:
        config: The shape.
        seed: The seed of the weights.
        folder: An existing folder.
        dtype: What is written.

    Raises:
        ModelError: The architecture's weights cannot be drawn in parts.
    """
    if config.model_type not in IN_PARTS:
        raise ModelError(f"a random {config.model_type} model cannot be drawn in parts: keep fewer blocks")
    network = meta_backbone(config)
    with seeded(seed), torch.no_grad():
        for _ in _drawn(network, _constructed):  # what transformers draws and overwrites: the seed has to be past it
            pass
        _write_shards(_drawn(network, network._init_weights), folder, dtype)
    config.architectures = [type(network).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)


def _constructed(module: nn.Module) -> None:
    """Draw what PyTorch's own constructor draws."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]


def _drawn(network: PreTrainedModel, draw: Callable[[nn.Module], None]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, in memory only until the next module's; children first, as transformers goes."""
    for prefix, module in _children_first(network, ""):
        shapes = dict(module.named_parameters(recurse=False))
        for name, parameter in shapes.items():
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
        draw(module)
        yield from ((f"{prefix}{name}", getattr(module, name).data) for name in shapes)
        for name, parameter in shapes.items():
            setattr(module, name, parameter)


def _children_first(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters of their own, with what their parameters' names begin with."""
    for name, child in module.named_children():
        yield from _children_first(child, f"{prefix}{name}.")
    if next(module.parameters(recurse=False), None) is not None:
        yield prefix, module


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write the tensors in shards with an index, none much larger than `SHARD`."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        shard[name] = tensor.to(dtype)
        if sum(each.nbytes for each in shard.values()) >= SHARD:
            _close(shard, folder, weight_map)
            shard = {}
    if shard:
        _close(shard, folder, weight_map)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))


def _close(shard: dict[str, Tensor], folder: Path, weight_map: dict[str, str]) -> None:
    name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, name)
