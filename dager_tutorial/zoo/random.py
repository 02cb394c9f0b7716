"""Random models at full size: the built-in configurations, and the tokenizer of each without a network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers.processors import TemplateProcessing
from transformers import (
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
from dager_tutorial.zoo.checkpoint import check_vocabulary, has_tokenizer, random_backbone, read_tokenizer
from dager_tutorial.zoo.pinned import pinned_tokenizer

RANDOM = "random:"
"""What the names of random models begin with."""


class BuiltIn(NamedTuple):
    """A configuration that needs no file.

    Attributes:
        original: The hub's name of the model whose shape it is.
        config: Makes the configuration.
    """

    original: str
    config: Callable[[], PreTrainedConfig]


# The shapes of the original checkpoints; the defaults of transformers' classes where nothing is said.
BUILT_IN = {
    "gpt2": BuiltIn("openai-community/gpt2", GPT2Config),
    "gpt2-large": BuiltIn(
        "openai-community/gpt2-large", functools.partial(GPT2Config, n_embd=1280, n_layer=36, n_head=20)
    ),
    "bert-base-uncased": BuiltIn("google-bert/bert-base-uncased", BertConfig),
    "distilbert-base-uncased": BuiltIn("distilbert/distilbert-base-uncased", DistilBertConfig),
    "roberta-base": BuiltIn(
        "FacebookAI/roberta-base",
        functools.partial(RobertaConfig, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5),
    ),
    "llama-2-7b": BuiltIn(
        "meta-llama/Llama-2-7b-hf", functools.partial(LlamaConfig, max_position_embeddings=4096, rms_norm_eps=1e-5)
    ),
}


def random_model(
    config: PreTrainedConfig, folder: Path | None, seed: int, cache: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Draw a model and find it a tokenizer: its folder's own, or that of a zoo model that fits its vocabulary.

    Args:
        config: Its shape.
        folder: The folder that the configuration comes from; None for a built-in one.
        seed: Seed of the weights.
        cache: The cache folder.

    Returns:
        The backbone, frozen, in eval mode and float32 on the CPU, and its tokenizer.

    Raises:
        ModelError: No tokenizer fits, or transformers cannot build the configuration.
    """
    tokenizer = offline_tokenizer(config, folder, cache)
    return random_backbone(config, seed), tokenizer


def offline_tokenizer(config: PreTrainedConfig, folder: Path | None, cache: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a random model (see `random_model`)."""
    borrowed = folder is None or not has_tokenizer(folder)
    source = pinned_tokenizer(fitting_tokenizer(config), cache) if folder is None or borrowed else folder
    tokenizer = read_tokenizer(source)
    if borrowed and config.model_type == "roberta":
        _frame_as_roberta(tokenizer)
    check_vocabulary(tokenizer, config, source)
    return tokenizer


def fitting_tokenizer(config: PreTrainedConfig) -> str:
    """The zoo model whose tokenizer a configuration's vocabulary has room for.

    Args:
        config: Any configuration.

    Returns:
        A key of `PINNED`.

    Raises:
        ModelError: The vocabulary is too small for all of them.

    >>> fitting_tokenizer(BertConfig())
    'minilm-l6'
    """
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
