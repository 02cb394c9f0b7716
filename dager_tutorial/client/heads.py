"""The client's network: the model that both sides know, inside the transformers class that trains it.

Chapter `01_gradients_leak`.

Only the head is made anew; the backbone inside is the very module that the server knows, so no weights are copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.errors import DagerError

_CLASSES: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "next_token": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
}


def head_settings(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], num_labels: int
) -> PretrainedConfig:
    """The transformers configuration of head and padding: a copy, for the backbone keeps its own.

    Args:
        backbone: The headless model.
        tokenizer: Its tokenizer.
        ids: Token ids of the batch, pads left out.
        num_labels: Number of classes.
    """
    settings = copy.deepcopy(backbone.config)
    settings.num_labels = num_labels
    settings.problem_type = "single_label_classification"
    # transformers takes a text's last token to be the last one that is not the pad, so no text may end in the
    # pad. Any other id serves: the attention mask hides it.
    ends = {tokens[-1] for tokens in ids}
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, *range(settings.vocab_size))
    settings.pad_token_id = next(
        (pad for pad in choices if pad is not None and pad < settings.vocab_size and pad not in ends), 0
    )
    return settings


def with_head(backbone: PreTrainedModel, settings: PretrainedConfig, config: ClientConfig) -> PreTrainedModel:
    """The architecture's class for the task around the backbone itself; only the head takes memory.

    Args:
        backbone: The headless model.
        settings: What `head_settings` made.
        config: Task, seed and deviation of the head.

    Raises:
        DagerError: transformers has no such class.
    """
    with torch.device("meta"):  # so that no second backbone is ever allocated
        client = _task_class(settings, config.task)(settings).eval()
    setattr(client, client.base_model_prefix, backbone)
    if config.task != "classification":
        client.tie_weights()
    if config.task == "next_token":
        client.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns for GPT-2
    _draw(client, next(backbone.parameters()), config)
    if config.task == "masked":
        client.tie_weights()  # once more: some decoders share a bias that was made just now
    return client


def _task_class(settings: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """The transformers class that trains this architecture on the task."""
    try:
        found: Any = _CLASSES[task]._model_mapping[type(settings)]
    except KeyError:
        raise DagerError(
            f"transformers has no {task} class for {settings.model_type}: choose another task or model"
        ) from None
    return found


def _draw(client: PreTrainedModel, like: nn.Parameter, config: ClientConfig) -> None:
    """Put every parameter of the head in memory, drawn from the seed, on the device and in the dtype of another."""
    generator = torch.Generator().manual_seed(config.seed)
    hidden = getattr(client.config, "initializer_range", 0.02)
    for name, parameter in list(client.named_parameters()):
        if parameter.is_meta:
            to_classes = config.task == "classification" and len(parameter) == client.config.num_labels
            _materialise(client, name, like, config.head_std if to_classes else hidden, generator)


def _materialise(
    client: PreTrainedModel, name: str, like: nn.Parameter, std: float, generator: torch.Generator
) -> None:
    """Put a head parameter in memory: weights normal with the given deviation, gains of norms one, biases zero.

    Drawn in float32 on the CPU, so that the seed gives one head on every device and in every dtype.
    """
    owner, _, leaf = name.rpartition(".")
    module = client.get_submodule(owner)
    shape = getattr(module, leaf).shape
    if leaf == "bias":
        value = torch.zeros(shape)
    elif isinstance(module, nn.LayerNorm):
        value = torch.ones(shape)
    else:
        value = torch.randn(shape, generator=generator) * std
    setattr(module, leaf, nn.Parameter(value.to(like.device, like.dtype), requires_grad=False))
