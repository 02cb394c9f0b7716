"""The head that turns a backbone into what a client trains: the server hands it out, so both sides know it.

Chapters `01_gradients_leak` and `09_completion`.

Only the head is made anew; the backbone inside is the very module that the server knows, so no weights are copied.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dager_tutorial.errors import DagerError, quote

_CLASSES: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "next_token": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
}


@dataclass(frozen=True)
class Head:
    """What the server broadcasts besides the backbone: the task, and the numbers of the head or how they are drawn.

    Attributes:
        task: `classification`, `next_token` or `masked`.
        classes: Number of classes; only classification has them.
        seed: Seed of a freshly drawn head.
        std: Standard deviation of a fresh head's map to the classes.
        weights: The numbers of a head that is not drawn, by the names of transformers' task class (`score.weight`
            for one); what is missing is drawn.

    Example:
        >>> Head(classes=3).task
        'classification'
    """

    task: str = "classification"
    classes: int = 2
    seed: int = 0
    std: float = 1e-3
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def with_head(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: Head) -> PreTrainedModel:
    """The architecture's class for the task around the backbone itself; only the head takes memory.

    Args:
        backbone: The headless model.
        tokenizer: Its tokenizer, for the pad token.
        head: Task and numbers of the head.

    Raises:
        DagerError: transformers has no such class, or given numbers do not fit.
    """
    settings = copy.deepcopy(backbone.config)  # the backbone keeps its own
    settings.num_labels = head.classes
    settings.problem_type = "single_label_classification"
    settings.pad_token_id = pad_for(settings, tokenizer, ())
    with torch.device("meta"):  # so that no second backbone is ever allocated
        network = _task_class(settings, head.task)(settings).eval()
    setattr(network, network.base_model_prefix, backbone)
    if head.task != "classification":
        network.tie_weights()
    if head.task == "next_token":
        network.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns for GPT-2
    _draw(network, next(backbone.parameters()), head)
    if head.task == "masked":
        network.tie_weights()  # once more: some decoders share a bias that was made just now
    return network


def pad_for(settings: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> int:
    """A token to pad with.

    transformers takes a text's last token to be the last one that is not the pad, so no text may end in the pad. Any
    other id serves: the attention mask hides it.

    Args:
        settings: Of the network.
        tokenizer: The model's tokenizer.
        ends: The last tokens of the batch.
    """
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, *range(settings.vocab_size))
    return next((pad for pad in choices if pad is not None and pad < settings.vocab_size and pad not in ends), 0)


def choose_pad(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[int]]) -> int:
    """Tell a network what it pads with, so that none of the texts ends in it.

    Args:
        network: The network, whose settings are changed.
        tokenizer: The model's tokenizer.
        texts: Token ids of the batch.

    Returns:
        The pad: see `pad_for`.
    """
    network.config.pad_token_id = pad_for(network.config, tokenizer, {ids[-1] for ids in texts})
    return int(network.config.pad_token_id)


def _task_class(settings: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """The transformers class that trains this architecture on the task."""
    try:
        found: Any = _CLASSES[task]._model_mapping[type(settings)]
    except KeyError:
        raise DagerError(
            f"transformers has no {task} class for {settings.model_type}: choose another task or model"
        ) from None
    return found


def _draw(network: PreTrainedModel, like: nn.Parameter, head: Head) -> None:
    """Put every parameter of the head in memory, given or drawn, on the device and in the dtype of another."""
    generator = torch.Generator().manual_seed(head.seed)
    hidden = getattr(network.config, "initializer_range", 0.02)
    for name, parameter in list(network.named_parameters()):
        if parameter.is_meta:
            to_classes = head.task == "classification" and len(parameter) == network.config.num_labels
            value = _fresh(network, name, head.std if to_classes else hidden, generator)
            _put(network, name, _given(head, name, value).to(like.device, like.dtype))


def _fresh(network: PreTrainedModel, name: str, std: float, generator: torch.Generator) -> Tensor:
    """A head parameter's first numbers: weights normal with the given deviation, gains of norms one, biases zero.

    Drawn in float32 on the CPU, so that the seed gives one head on every device and in every dtype.
    """
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    shape = getattr(module, leaf).shape
    if leaf == "bias":
        return torch.zeros(shape)
    if isinstance(module, nn.LayerNorm):
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * std


def _given(head: Head, name: str, drawn: Tensor) -> Tensor:
    """The numbers of a head parameter: those that were given, else those that were drawn."""
    given = head.weights.get(name, drawn)
    if given.shape != drawn.shape:
        raise DagerError(
            f"the head's {quote(name)} has shape {tuple(given.shape)}, the model's {tuple(drawn.shape)}: "
            "give the head that the server handed out"
        )
    return given


def _put(network: PreTrainedModel, name: str, value: Tensor) -> None:
    """Put a head parameter in memory."""
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
