"""A backbone that reads its deeper blocks from the checkpoint's safetensors files when they run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dager_tutorial.errors import ModelError, quote
from dager_tutorial.models import adapter_for
from dager_tutorial.models.streaming import RESIDENT_BLOCKS, Stored, stream
from dager_tutorial.zoo.checkpoint import INDEX, meta_backbone

DTYPES = ("F64", "F32", "F16", "BF16")
"""What weights may be stored in; quantised ones are not read."""


def streamed_backbone(folder: Path, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A headless model with embeddings, norms and first blocks in memory, in float32; the rest comes when it runs.

    Args:
        folder: A folder with `*.safetensors`, in as many files as there may be.
        config: Its configuration; with fewer blocks than the checkpoint, the rest is never read.
        device: Where to compute.

    Raises:
        ModelError: A shard is missing, broken or outside the folder, or a tensor is missing, of another shape or in a
            dtype that is not known.
    """
    network = meta_backbone(config)
    blocks = adapter_for(network).blocks
    stored = _matching(network, stored_tensors(folder), folder)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    deeper = [{path: names[id(p)] for path, p in block.named_parameters()} for block in blocks[RESIDENT_BLOCKS:]]
    coming = {name for block in deeper for path, name in block.items() if network.get_parameter(name).dim() > 1}
    _settle(network, {name: place for name, place in stored.items() if name not in coming}, device)
    for block, paths in zip(blocks[RESIDENT_BLOCKS:], deeper, strict=True):
        stream(block, {path: stored[name] for path, name in paths.items()})
    return network


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint lies.

    Args:
        folder: A folder with one safetensors file, or with several and the index that transformers writes.

    Raises:
        ModelError: No such file, or an index that is broken or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return {key: Stored(file, key) for file in sorted(folder.glob("*.safetensors")) for key in _keys(file)}
    try:
        listed = json.loads(index.read_text())["weight_map"]
        files = {key: Path(name) for key, name in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of shards ({type(error).__name__}): copy it again") from error
    for file in files.values():
        if file.name != str(file) or file.suffix != ".safetensors":
            raise ModelError(f"{index} names {quote(file)}, which is no safetensors file in its folder: it is not read")
    return {key: Stored(folder / file, key) for key, file in files.items()}


def _keys(file: Path) -> list[str]:
    """The names of a file's tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {file} ({quote(error)}): copy the shard again") from error


def _matching(network: PreTrainedModel, stored: Mapping[str, Stored], folder: Path) -> dict[str, Stored]:
    """For each parameter of the headless model its tensor, whether or not the checkpoint has a head around it."""
    found: dict[str, Stored] = {}
    for name in dict(network.named_parameters()):
        place = stored.get(name) or stored.get(f"{network.base_model_prefix}.{name}")
        if place is None:
            raise ModelError(
                f"the weights in {folder} have no {name} to read one block at a time: save the whole model again, "
                "or load it at once (--no-stream)"
            )
        found[name] = place
    _check_files(network, found)
    return found


def _check_files(network: PreTrainedModel, found: Mapping[str, Stored]) -> None:
    """Look at every shard once, without reading a number."""
    for path in {place.path for place in found.values()}:
        available = set(_keys(path))
        with safe_open(path, framework="pt") as file:
            for name, place in found.items():
                if place.path == path:
                    if place.key not in available:
                        raise ModelError(f"{path} lacks {place.key}, which the index says it holds: copy it again")
                    _check_tensor(file.get_slice(place.key), network.get_parameter(name), place)


def _check_tensor(described: Any, parameter: nn.Parameter, place: Stored) -> None:
    """Look at what a shard says of a tensor."""
    shape, dtype = tuple(described.get_shape()), described.get_dtype()
    if dtype not in DTYPES:
        raise ModelError(f"{place.key} in {place.path} is {dtype}: weights are read from {', '.join(DTYPES)}")
    if shape != tuple(parameter.shape):
        raise ModelError(
            f"{place.key} in {place.path} has shape {shape}, the configuration says {tuple(parameter.shape)}: "
            "they do not belong together"
        )


def _settle(network: PreTrainedModel, staying: Mapping[str, Stored], device: torch.device) -> None:
    """Put in memory what stays there; what comes later gets the device alone."""
    for path, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = staying.get(f"{path}.{name}" if path else name)
            value = torch.empty((), device=device).expand(parameter.shape)
            if place is not None:
                value = place.read().to(device, torch.float32, copy=True)  # a mapped file would count as memory
            setattr(module, name, nn.Parameter(value, requires_grad=False))
