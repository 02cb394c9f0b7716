"""The client: a private batch and a loss become an update (chapter 1).

The client runs the model classes of transformers unmodified. Only the head is made anew; the backbone inside
is the very module that the server knows, so no weights are copied.
"""

from __future__ import annotations

import copy
import operator
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from dager_tutorial.errors import DagerError, UpdateError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV
from dager_tutorial.models.language_model import frame_ids
from dager_tutorial.errors import quote
from dager_tutorial.update import Update

TASKS = ("classification", "next_token", "masked")
LOSSES = ("cross_entropy", "frobenius")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PADDING_SIDES = ("right", "left")
_HEAD_STD = 1e-3  # of the map to the classes, as the paper initialises its classification heads
_IGNORED = -100  # the label that transformers' losses skip
_CLASSES: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "next_token": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
}
# Masked-language training as BERT does it: how many tokens are targets, and what becomes of a target.
_TARGETS, _MASKED, _RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class _Batch:
    """Padded tensors of a batch on the model's device, each (batch, longest text).

    Attributes:
        ids: Token ids, pads included.
        mask: 1 at real tokens, 0 at pads.
        targets: The original ids where masked-language training asks for them, `_IGNORED` elsewhere.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor | None


def client_update(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    task: str = "classification",
    loss: str = "cross_entropy",
    dtype: str = "float32",
    share: str | Sequence[str] = "all",
    padding_side: str = "right",
    max_length: int | None = None,
    seed: int = 0,
) -> Update:
    """Compute the update that a client with this batch would send in one step of FedSGD.

    The model is in evaluation mode (no dropout) and left as it was: no parameter has or requires a gradient.

    Args:
        model: The shared model.
        texts: The private batch.
        labels: One class per text, from 0; alternating 0 and 1 when left out. Only classification uses them.
        task: ``"classification"`` (the architecture's sequence-classification class with a fresh seeded head),
            ``"next_token"`` (its causal language model; mean over all predicted tokens of the batch), or
            ``"masked"`` (its masked language model with a fresh seeded head; mean over the masked tokens of the
            batch). The network then sees the texts as `masked_inputs` corrupts them, and it is the corrupted
            texts that the attack recovers.
        loss: ``"cross_entropy"``, or ``"frobenius"``: the sum of squares of the last hidden state over a
            text's real tokens, mean over the batch. The latter has no head. After a final normalisation
            without trained gain it is nearly constant, so a randomly initialised model gives almost no
            gradient.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``: forward, backward and gradients.
            Where it differs from the model's a converted copy of the weights is made.
        share: ``"all"`` parameters, ``"attention"`` (weights and biases of every block's query, key, value
            and output maps), or a list of parameter names as the update spells them. Gradients of others are
            never computed.
        padding_side: ``"right"`` or ``"left"``; the gradient is the same up to rounding.
        max_length: Longest text in tokens, special ones included; longer texts are cut. None: no cut.
        seed: Seed of a fresh head, and of the masks.

    Returns:
        Detached gradients on the CPU, each of its parameter's shape, in ``dtype``. Shared parameters that the
        loss does not depend on are left out, as transformers leaves their ``.grad`` at None.

    Raises:
        DagerError: An option is unknown, a text or label cannot be used, or the gradient overflows the dtype.
    """
    _check_options(task=task, loss=loss, dtype=dtype, padding_side=padding_side)
    ids = _private_batch(model, texts, max_length)
    classes = _labels(labels, len(ids))
    backbone = _in_dtype(model.network, DTYPES[dtype])
    adapter = adapter_for(backbone)
    _check_fit(adapter, task, loss, padding_side)
    ids, targets = _masked_batch(model, ids, seed) if task == "masked" else (ids, None)
    config = _client_config(backbone, model.tokenizer, ids, max(2, max(classes) + 1))
    client = _with_head(backbone, config, task, seed)
    batch = _pad(ids, targets, config.pad_token_id, padding_side, model.device)
    with _requiring_grad(_shared(client, adapter, share)) as shared:
        value = _loss(client, adapter, batch, classes, task, loss)
        gradients = _gradients(value, shared, share)
    try:
        return Update(gradients, model=model.name)
    except UpdateError as error:
        raise DagerError(f"in dtype {dtype!r} {error} with bfloat16, float32 or float64") from error


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Token ids exactly as the client trains on them, special tokens included, pads left out.

    Args:
        tokenizer: The model's tokenizer.
        texts: The texts.
        max_length: Longest text in tokens, special ones included; longer texts are cut. None: no cut.

    Returns:
        One list of token ids per text.

    Raises:
        DagerError: The texts are not a list of strings, or ``max_length`` leaves no room.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DagerError("texts must be a list of strings: wrap a single text in a list")
    if max_length is not None and max_length <= tokenizer.num_special_tokens_to_add():
        special = tokenizer.num_special_tokens_to_add()
        raise DagerError(f"max_length is {max_length}: it must exceed the {special} special tokens of a text")
    if not texts:
        return []
    cut = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    encoded = tokenizer(list(texts), padding=False, return_attention_mask=False, verbose=False, **cut)
    return [list(ids) for ids in encoded["input_ids"]]


def masked_inputs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Corrupt texts as masked-language training does: what the network sees, and what it is asked for.

    In every text 15 % of the tokens, at least one, are targets; those that frame it are not. A target becomes the
    mask token (80 %), a random token (10 %) or stays (10 %), as in BERT (Devlin et al., 2019). Client and
    scoring both call this function: the truth is what the network saw. It depends on the seed and the text
    alone, not on the text's place in the batch; equal texts are corrupted one by one.

    Args:
        tokenizer: The model's tokenizer.
        ids: Token ids of the texts, as `encode` gives them.
        seed: Seed of the choice.

    Returns:
        For each text the token ids that the network sees, and as many targets: the original id, or -100 where
        nothing is asked.

    Raises:
        DagerError: The tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise DagerError(
            "task 'masked' needs a mask token and the tokenizer has none: choose task 'classification', or a "
            "tokenizer with a mask token"
        )
    frame = frame_ids(tokenizer)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    seen: Counter[tuple[int, ...]] = Counter()
    inputs, targets = [], []
    for tokens in map(tuple, ids):
        chance = random.Random(f"{seed} {seen[tokens]} {tokens}")
        seen[tokens] += 1
        places = [place for place, token in enumerate(tokens) if token not in frame]
        chosen = chance.sample(places, min(len(places), max(1, round(_TARGETS * len(places)))))
        corrupted = {place: _corrupted(tokens[place], tokenizer.mask_token_id, ordinary, chance) for place in chosen}
        inputs.append([corrupted.get(place, token) for place, token in enumerate(tokens)])
        targets.append([token if place in corrupted else _IGNORED for place, token in enumerate(tokens)])
    return inputs, targets


def _corrupted(token: int, mask: int, ordinary: Sequence[int], chance: random.Random) -> int:
    """What the network sees in place of a target."""
    draw = chance.random()
    if draw < _MASKED:
        return mask
    return chance.choice(ordinary) if draw < _MASKED + _RANDOM else token


def _check_options(**given: str) -> None:
    """Raise when an option has none of its values, and say which it has."""
    allowed = {"task": TASKS, "loss": LOSSES, "dtype": tuple(DTYPES), "padding_side": PADDING_SIDES}
    for option, value in given.items():
        if value not in allowed[option]:
            raise DagerError(f"{option} is {quote(value)}: choose one of {', '.join(allowed[option])}")


def _check_fit(adapter: Adapter, task: str, loss: str, padding_side: str) -> None:
    """Raise when a causal model is asked for what only bidirectional ones can do, or the other way round."""
    kind = adapter.config.model_type
    if adapter.causal:
        if task == "masked":
            raise DagerError(f"task 'masked' needs a bidirectional model and {kind} is causal: use task 'next_token'")
        return
    if task == "next_token":
        raise DagerError(f"task 'next_token' needs a causal model and {kind} is not: use task 'masked'")
    if padding_side == "left" and loss == "cross_entropy" and task == "classification":
        raise DagerError(
            f"padding_side 'left' needs a causal model: {kind} classifies by a row's first position, "
            "which would be a pad"
        )


def _private_batch(model: LanguageModel, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
    """The token ids of a batch, after checking that the model can take every text."""
    if len(texts) == 0:
        raise DagerError("the batch is empty: give at least one text")
    ids = encode(model.tokenizer, texts, max_length)
    special = model.tokenizer.num_special_tokens_to_add()
    positions = adapter_for(model.network).max_positions
    for index, tokens in enumerate(ids):
        if len(tokens) <= special:
            raise DagerError(f"text {index} ({quote(texts[index], 40)}) has no tokens: leave it out")
        if len(tokens) > positions:
            raise DagerError(
                f"text {index} has {len(tokens)} tokens and the model {positions} positions: "
                f"max_length={positions} cuts it"
            )
    _check_vocabulary(model, ids)
    return ids


def _check_vocabulary(model: LanguageModel, ids: list[list[int]]) -> None:
    """Raise when the model has no embedding for a token."""
    vocabulary = model.network.config.vocab_size
    for index, tokens in enumerate(ids):
        if max(tokens) >= vocabulary:
            raise DagerError(
                f"text {index} has token id {max(tokens)} and the model's vocabulary {vocabulary} rows: "
                "tokenizer and model do not belong together"
            )


def _masked_batch(model: LanguageModel, ids: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Corrupted inputs and targets of a batch, after checking that the model can take them."""
    inputs, targets = masked_inputs(model.tokenizer, ids, seed)
    _check_vocabulary(model, inputs)
    if all(target == _IGNORED for row in targets for target in row):
        raise DagerError("task 'masked' needs a token to mask: every text has special tokens only")
    return inputs, targets


def _labels(labels: Sequence[int] | None, batch_size: int) -> list[int]:
    """The labels as plain integers, alternating when none are given."""
    if labels is None:
        return [index % 2 for index in range(batch_size)]
    if len(labels) != batch_size:
        raise DagerError(f"there are {len(labels)} labels for {batch_size} texts: give one per text")
    try:
        classes = [operator.index(label) for label in labels]
    except TypeError:
        raise DagerError("labels must be integers: number the classes from 0") from None
    if min(classes) < 0:
        raise DagerError(f"label {min(classes)} is negative: number the classes from 0")
    return classes


def _in_dtype(network: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The network itself when it has the dtype, else a copy with converted parameters.

    Buffers keep theirs: transformers holds rotary frequencies in float32 whatever the weights are.
    """
    if network.dtype == dtype:
        return network
    converted: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, converted)  # a memo: these take the place of copies of the originals


def _client_config(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], num_labels: int
) -> PretrainedConfig:
    """The configuration of head and padding: a copy, for the backbone keeps its own."""
    config = copy.deepcopy(backbone.config)
    config.num_labels = num_labels
    config.problem_type = "single_label_classification"
    # transformers takes a text's last token to be the last one that is not the pad, so no text may end in the
    # pad. Any other id serves: the attention mask hides it.
    ends = {tokens[-1] for tokens in ids}
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, *range(config.vocab_size))
    config.pad_token_id = next(
        (pad for pad in choices if pad is not None and pad < config.vocab_size and pad not in ends), 0
    )
    return config


def _with_head(backbone: PreTrainedModel, config: PretrainedConfig, task: str, seed: int) -> PreTrainedModel:
    """The architecture's class for the task around the backbone itself; only the head takes memory.

    Built on the meta device, so that no second backbone is ever allocated.
    """
    with torch.device("meta"):
        client = _task_class(config, task)(config).eval()
    setattr(client, client.base_model_prefix, backbone)
    if task != "classification":
        client.tie_weights()
    if task == "next_token":
        client.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns for GPT-2
    generator, hidden = torch.Generator().manual_seed(seed), getattr(config, "initializer_range", 0.02)
    for name, parameter in list(client.named_parameters()):
        if parameter.is_meta:
            std = _HEAD_STD if task == "classification" and len(parameter) == config.num_labels else hidden
            _materialise(client, name, backbone, std, generator)
    if task == "masked":
        client.tie_weights()  # once more: some decoders share a bias that was made just now
    return client


def _task_class(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """The transformers class that trains this architecture on the task."""
    try:
        found: Any = _CLASSES[task]._model_mapping[type(config)]
    except KeyError:
        raise DagerError(
            f"transformers has no {task} class for {config.model_type}: choose another task or model"
        ) from None
    return found


def _materialise(
    client: PreTrainedModel, name: str, backbone: PreTrainedModel, std: float, generator: torch.Generator
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
    like = next(backbone.parameters())
    setattr(module, leaf, nn.Parameter(value.to(like.device, like.dtype), requires_grad=False))


def _pad(ids: list[list[int]], targets: list[list[int]] | None, pad: int, side: str, device: torch.device) -> _Batch:
    """Pad token ids, and targets where there are any, to the longest text."""
    longest = max(map(len, ids))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        fills = [[value] * (longest - len(row)) for row in rows]
        whole = [row + fill if side == "right" else fill + row for row, fill in zip(rows, fills, strict=True)]
        return torch.tensor(whole, device=device)

    mask = padded([[1] * len(tokens) for tokens in ids], 0)
    return _Batch(padded(ids, pad), mask, None if targets is None else padded(targets, _IGNORED))


def _shared(client: PreTrainedModel, adapter: Adapter, share: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters whose gradients the client sends, by the names transformers gives them."""
    parameters = dict(client.named_parameters())
    if share == "all":
        return parameters
    if share == "attention":
        chosen = _attention_parameters(adapter)
        return {name: parameter for name, parameter in parameters.items() if id(parameter) in chosen}
    if isinstance(share, str) or len(share) == 0:
        raise DagerError(f"share is {quote(share)}: choose all, attention, or a list of parameter names")
    for name in share:
        if name not in parameters:
            raise DagerError(
                f"share names {quote(name)}, which the client's {client.config.model_type} model has not: "
                f"use names such as {next(iter(parameters))!r}"
            )
    return {name: parameter for name, parameter in parameters.items() if name in share}


def _attention_parameters(adapter: Adapter) -> set[int]:
    """The identities of weights and biases of every block's query, key, value and attention output maps."""
    return {
        id(parameter)
        for block in range(adapter.num_blocks)
        for kind in (QKV, ATTENTION_OUTPUT)
        for module in adapter.linear_maps(block, kind)
        for parameter in module.parameters()
    }


@contextmanager
def _requiring_grad(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Let just these parameters require a gradient for a while."""
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def _loss(
    client: PreTrainedModel, adapter: Adapter, batch: _Batch, classes: list[int], task: str, loss: str
) -> torch.Tensor:
    """The scalar loss of the batch, by the client's unmodified forward pass."""
    # Positions count real tokens, so that behind left padding a text stands where it stands alone.
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": adapter.position_ids(batch.mask),
    }
    if loss == "frobenius":
        hidden = adapter.network(**inputs, use_cache=False).last_hidden_state  # batch x length x width
        rows = hidden[batch.mask.bool()]
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum() / len(batch.ids)
    if task == "classification":
        labels = torch.tensor(classes, device=batch.ids.device)
    else:
        labels = _next_token_labels(batch) if batch.targets is None else batch.targets
    return client(**inputs, labels=labels, use_cache=False).loss


def _next_token_labels(batch: _Batch) -> torch.Tensor:
    """Labels for the causal loss, which shifts them itself. Pads are no targets, nor is a text's first token.

    Behind left padding transformers would otherwise predict the first token from a pad.
    """
    labels = batch.ids.masked_fill((batch.mask == 0) | (batch.mask.cumsum(-1) == 1), _IGNORED)
    if bool((labels == _IGNORED).all()):
        raise DagerError("task 'next_token' needs a text of at least two tokens: every text has one")
    return labels


def _gradients(
    value: torch.Tensor, shared: dict[str, nn.Parameter], share: str | Sequence[str]
) -> dict[str, torch.Tensor]:
    """Gradients of the loss in the shared parameters it depends on, detached, on the CPU."""
    if not value.requires_grad:
        raise DagerError(f"the loss depends on no parameter of share {quote(share)}: share others")
    found = torch.autograd.grad(value, list(shared.values()), allow_unused=True)
    return {name: gradient.detach().cpu() for name, gradient in zip(shared, found, strict=True) if gradient is not None}
