"""From a folder, or from a configuration alone, to a backbone and a tokenizer.

Weights are read from safetensors only, and no code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dager_tutorial.errors import ModelError
from dager_tutorial.zoo.quiet import explained, quiet

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

SELF_CONTAINED = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizer classes that mean: all is in `tokenizer.json`."""

ENTRY_A_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Lists in configurations that have one entry for every transformer block."""


def read_config(folder: Path, blocks: int | None = None) -> PreTrainedConfig:
    """Read a configuration, cut to its first blocks.

    Args:
        folder: A folder with `config.json`.
        blocks: How many transformer blocks to keep, counted from the input; None keeps all.

    Returns:
        The configuration.

    Raises:
        ModelError: No readable configuration, or not that many blocks.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    with explained(f"{folder / 'config.json'}"), quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return keep_blocks(config, blocks)


def keep_blocks(config: PreTrainedConfig, blocks: int | None) -> PreTrainedConfig:
    """Cut a configuration to its first transformer blocks, in place.

    Args:
        config: Any decoder's or encoder's configuration.
        blocks: From 1 to the number of blocks; None keeps all.

    Returns:
        The same object.

    Raises:
        ModelError: `blocks` is out of range.
    """
    whole = getattr(config, "num_hidden_layers", None)
    if not isinstance(whole, int) or whole < 1:
        raise ModelError(
            f"a {config.model_type} configuration has no number of transformer blocks: it is not supported"
        )
    if blocks is None:
        return config
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= whole:
        raise ModelError(f"blocks must be a whole number from 1 to {whole} for this model, not {blocks!r}")
    config.num_hidden_layers = blocks
    for name, value in vars(config).items():
        if name in ENTRY_A_BLOCK and isinstance(value, list):
            setattr(config, name, value[:blocks])
    return config


def read_backbone(folder: Path, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Read the headless model of a checkpoint, in float32.

    Args:
        folder: A folder with `*.safetensors`.
        config: Its configuration; with fewer blocks than the checkpoint, the rest is not read.
        seed: Seeds a pooler that the checkpoint lacks, the one part that may be missing.

    Returns:
        The backbone, frozen and in eval mode.

    Raises:
        ModelError: No safetensors, a broken file, or tensors missing or of another shape.
    """
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors file, and pickled weights are never read: "
            "save the model again with save_pretrained(folder, safe_serialization=True)"
        )
    with explained(f"the weights in {folder}"), quiet(), seeded(seed):
        network, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors of a {config.model_type} model, "
            f"the first {missing[0]}: save the whole model again"
        )
    return _frozen(network)


def random_backbone(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A headless model with the initial weights that transformers gives it.

    They are those of `torch.manual_seed(seed); AutoModel.from_config(config)`, whatever device is used
    later, and the caller's random state stays as it was.

    Args:
        config: The shape.
        seed: The seed of the weights.

    Returns:
        The backbone in float32 on the CPU, frozen and in eval mode.

    Raises:
        ModelError: Transformers cannot build this configuration.
    """
    with explained(f"the {config.model_type} configuration"), quiet(), seeded(seed):
        network = AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    return _frozen(network)


def meta_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A headless model whose parameters have shapes and no numbers, while its buffers (rotary frequencies) have theirs.

    Args:
        config: The shape.

    Raises:
        ModelError: Transformers cannot build this configuration.
    """
    with explained(f"the {config.model_type} configuration"), quiet(), init_empty_weights(include_buffers=False):
        network = AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    return _frozen(network)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer: transformers makes up an empty one where there is none."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read a folder's tokenizer.

    Args:
        folder: A folder with tokenizer files.

    Returns:
        The tokenizer.

    Raises:
        ModelError: There is none, or it is broken.
    """
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer: write it there with tokenizer.save_pretrained(folder)")
    with explained(f"the tokenizer in {folder}"), quiet():
        loader = PreTrainedTokenizerFast if _is_self_contained(folder) else AutoTokenizer
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _is_self_contained(folder: Path) -> bool:
    # AutoTokenizer overrules what such a folder says for some architectures (qwen2) and cuts texts otherwise
    described, stored = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not described.is_file() or not stored.is_file():
        return False
    return json.loads(described.read_text()).get("tokenizer_class") in SELF_CONTAINED


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a tokenizer whose ids the model has no embeddings for.

    Args:
        tokenizer: The tokenizer.
        config: The model's configuration.
        folder: Where the tokenizer comes from, for the message.

    Raises:
        ModelError: It has more tokens than the model.
    """
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the model only {config.vocab_size}: "
            "they do not belong together"
        )


def save_checkpoint(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder: `config.json`, `model.safetensors` and the tokenizer's files."""
    with quiet():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what PyTorch draws on the CPU, and give the caller's random state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too, and for good
        yield


def _frozen(network: PreTrainedModel) -> PreTrainedModel:
    network.requires_grad_(False)
    return network.eval()
