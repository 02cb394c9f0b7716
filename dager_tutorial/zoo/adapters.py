"""Low-rank adapters as peft writes them: a configuration and a safetensors file, read without peft.

Chapter `13_adapters`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dager_tutorial.errors import ModelError, quote
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import LowRank, low_rank, part_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNCHANGED = (True, False, "gaussian", "eva")
"""Initialisations (`init_lora_weights`) that leave the base model's weights alone."""


def load_adapter(model: LanguageModel, folder: str | os.PathLike[str]) -> LanguageModel:
    """Put the adapter of a folder that peft wrote on its base model.

    Args:
        model: The base model.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The model with merged weights, and the adapter beside it.

    Raises:
        ModelError: A file is missing or unreadable, the adapter is none of plain LoRA, or of another base model.

    See chapter `13_adapters`.
    """
    place = Path(folder).expanduser()
    config, pairs = _config(place), dict[str, dict[str, Tensor]]()
    for name, tensor in _weights(place).items():
        part = part_of(name)
        if part is not None:
            pairs.setdefault(part[0], {})[part[1]] = tensor
    if not pairs:
        raise ModelError(f"{quote(place / WEIGHTS)} holds no lora_A and lora_B: give a folder of a LoRA adapter")
    return model.adapted(dict(_map(model, config, module, parts) for module, parts in pairs.items()))


def _map(model: LanguageModel, config: dict[str, Any], module: str, parts: dict[str, Tensor]) -> tuple[str, LowRank]:
    """One adapted map with the backbone's own name of its module."""
    if set(parts) != {"A", "B"}:
        raise ModelError(f"the adapter of {quote(module)} has lora_{min(parts)} alone: copy or save the folder again")
    return low_rank(model.network, module, parts["A"], parts["B"], _scaling(config, module, len(parts["A"])))


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor on `B A`: alpha over the rank, or over its root."""
    patterns = config.get("alpha_pattern") or {}
    own = [alpha for ending, alpha in patterns.items() if f".{module}".endswith(f".{ending}")]
    alpha = own[0] if own else config.get("lora_alpha", rank)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _config(folder: Path) -> dict[str, Any]:
    """The configuration, after a look at whether it is of an adapter whose algebra is known."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{quote(folder / CONFIG)} cannot be read ({quote(error)}): give a folder that peft's save_pretrained wrote"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{quote(folder / CONFIG)} is no configuration: give a folder that peft wrote")
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA" or config.get("use_dora"):
        raise ModelError(f"{quote(folder)} holds {'DoRA' if kind == 'LORA' else quote(kind)}: only plain LoRA is read")
    if start not in UNCHANGED:
        raise ModelError(
            f"{quote(folder)} began as {quote(start)}, which changes the base model's weights: load it with peft and "
            "give LanguageModel.adapted(peft_model), or let peft convert it when it saves"
        )
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors. A pickle is never read."""
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        found = " (pickled .bin files never are)" if (folder / "adapter_model.bin").exists() else ""
        raise ModelError(f"{quote(path)} cannot be read{found}: save the adapter as safetensors") from error
