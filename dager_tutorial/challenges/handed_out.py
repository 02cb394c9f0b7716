"""The low-rank adapter that an envelope's server handed out: drawn from the record's seed, written as peft writes one.

Chapter `16_sealed_envelopes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from dager_tutorial.models.low_rank import LowRankMaps, low_rank, wire_name

FILES = ("adapter_config.json", "adapter_model.safetensors")


def drawn(network: PreTrainedModel, record: Mapping[str, Any], seed: int) -> LowRankMaps:
    """A fresh adapter: A normal, B zero.

    Args:
        network: The headless model.
        record: `rank`, `alpha` and `maps`, the names of the adapted modules, which store outputs first.
        seed: Of the draw.

    Raises:
        ModelError: The model has no such map.
    """
    draw, rank = torch.Generator().manual_seed(seed), int(record["rank"])
    maps = []
    for name in record["maps"]:
        outputs, inputs = network.get_submodule(name).weight.shape
        down = torch.randn(rank, inputs, generator=draw) / rank
        maps.append(low_rank(network, name, down, torch.zeros(outputs, rank), float(record["alpha"]) / rank))
    return dict(maps)


def contents(maps: LowRankMaps, record: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of an adapter, by their names.

    Args:
        maps: What `drawn` gives.
        record: See `drawn`.
    """
    settings = {"peft_type": "LORA", "r": record["rank"], "lora_alpha": record["alpha"]}
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in record["maps"]})
    tensors = {}
    for name, each in maps.items():
        tensors[wire_name(f"{name}.lora_A.weight")] = each.down
        tensors[wire_name(f"{name}.lora_B.weight")] = each.up
    return dict(zip(FILES, (json.dumps(settings, indent=1).encode(), save(tensors)), strict=True))
