"""A private batch, from texts to padded tensors, and the truth that an attack is compared with.

Chapter `01_gradients_leak`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dager_tutorial.client.config import ClientConfig, check_fit
from dager_tutorial.client.masking import IGNORED, masked_inputs
from dager_tutorial.errors import DagerError, quote
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel, frame_ids
from dager_tutorial.models.training import filled, filled_and_masked


@dataclass(frozen=True)
class Truth:
    """What the client knows and the server does not. Only `evaluation` may compare it with a reconstruction.

    Attributes:
        texts: The batch.
        labels: One class per text.
        sequences: Token ids of each text, special ones included, as the network saw them: all but the last one under
            `next_token` (it is a target and no input), the corrupted text under `masked`.
        wholes: The same with what is only a target: the last token, and what stood behind the masks.
        n_tokens: Number of tokens that the client trained on, special ones included, pads never.
        task: What was trained.
        hidden_size: Width of the model's hidden states.
        frame: Ids of the tokens that frame or pad a text and are no part of its content.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    wholes: tuple[tuple[int, ...], ...]
    n_tokens: int
    task: str
    hidden_size: int
    frame: frozenset[int]


@dataclass(frozen=True)
class PrivateBatch:
    """A batch that the model can take.

    Attributes:
        texts: The texts.
        labels: One class per text, from 0.
        inputs: Token ids of each text as the network sees them, pads left out.
        targets: The original ids where masked-language training asks for them, `IGNORED` elsewhere; None for others.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    inputs: list[list[int]]
    targets: list[list[int]] | None

    def _originals(self) -> list[tuple[int, ...]]:
        """The texts before any token was masked."""
        if self.targets is None:
            return [tuple(ids) for ids in self.inputs]
        pairs = zip(self.inputs, self.targets, strict=True)
        return [tuple(a if b == IGNORED else b for a, b in zip(*pair, strict=True)) for pair in pairs]

    def truth(self, model: LanguageModel, task: str) -> Truth:
        """What an attack on this batch can recover.

        Args:
            model: The model that both sides share.
            task: What is trained.
        """
        end = -1 if task == "next_token" else None
        seen = [tuple(ids[:end]) for ids in self.inputs]
        return Truth(
            texts=self.texts,
            labels=self.labels,
            sequences=tuple(seen),
            # Of a text of a single token nothing is seen and nothing is asked for.
            wholes=tuple(ids if one else () for ids, one in zip(self._originals(), seen, strict=True)),
            n_tokens=sum(map(len, self.inputs)),
            task=task,
            hidden_size=model.hidden_size,
            frame=frame_ids(model.tokenizer),
        )


def mini_batches(batch: PrivateBatch, size: int) -> Iterator[PrivateBatch]:
    """The texts of a batch in their order, so many at a time; the last part may have fewer.

    Args:
        batch: The whole.
        size: Texts of a part.
    """
    for start in range(0, len(batch.texts), size):
        part = slice(start, start + size)
        targets = None if batch.targets is None else batch.targets[part]
        yield PrivateBatch(batch.texts[part], batch.labels[part], batch.inputs[part], targets)


@dataclass(frozen=True)
class Padded:
    """Tensors of a batch on the model's device, int64.

    Attributes:
        ids: Token ids, pads included.
        mask: 1 at real tokens, 0 at pads.
        targets: What masked-language training asks for, `IGNORED` elsewhere; None for other tasks.
    """

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]
    targets: Int[Tensor, "batch length"] | None


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Token ids exactly as the client trains on them, special tokens included, pads left out.

    Args:
        tokenizer: The model's tokenizer.
        texts: The texts.
        max_length: Longest text in tokens, special ones included; longer texts are cut. None: no cut.

    Returns:
        One list of token ids per text.

    Raises:
        DagerError: The texts are not a list of strings, or `max_length` leaves no room.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DagerError("texts must be a list of strings: wrap a single text in a list")
    special = tokenizer.num_special_tokens_to_add()
    if max_length is not None and max_length <= special:
        raise DagerError(f"max_length is {max_length}: it must exceed the {special} special tokens of a text")
    if not texts:
        return []
    cut = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    encoded = tokenizer(list(texts), padding=False, return_attention_mask=False, verbose=False, **cut)
    return [list(ids) for ids in encoded["input_ids"]]


def truth_of(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
) -> Truth:
    """What an attack on a client's update can recover, without computing the update.

    Args:
        model: The model that both sides share.
        texts: The batch.
        labels: See `step.client_update`.
        config: What the client does.

    Raises:
        DagerError: A text or label cannot be used, or the model cannot do what is asked.
    """
    config = config or ClientConfig()
    return read_batch(model, texts, labels, config).truth(model, config.task)


def read_batch(
    model: LanguageModel, texts: Sequence[str], labels: Sequence[int] | None, config: ClientConfig
) -> PrivateBatch:
    """Tokenise a batch, corrupt it where the task says so, and check that the model can take it.

    Args:
        model: The shared model.
        texts: The texts.
        labels: One class per text, from 0; alternating 0 and 1 when left out.
        config: What the client does.

    Raises:
        DagerError: A text or label cannot be used, or the model cannot do what is asked.
    """
    adapter = adapter_for(model.network)
    ids = _tokens(model, texts, config.max_length, adapter.max_positions)
    classes = _classes(labels, len(ids))
    check_fit(config, model.network.config.model_type, causal=adapter.causal)
    if config.task == "next_token" and max(map(len, ids)) < 2:
        raise DagerError("task 'next_token' needs a text of at least two tokens: every text has one")
    inputs, targets = _masked(model, ids, config.seed) if config.task == "masked" else (ids, None)
    return PrivateBatch(tuple(texts), classes, inputs, targets)


def pad(batch: PrivateBatch, token: int, side: str, device: torch.device) -> Padded:
    """Pad a batch to its longest text.

    Args:
        batch: The batch.
        token: Token id of pads.
        side: `right` or `left`.
        device: Where the tensors go.
    """
    ids, mask = filled_and_masked(batch.inputs, token, side=side, device=device)
    return Padded(
        ids, mask, None if batch.targets is None else filled(batch.targets, IGNORED, side=side, device=device)
    )


def _tokens(model: LanguageModel, texts: Sequence[str], max_length: int | None, positions: int) -> list[list[int]]:
    """The token ids of a batch, after checking that the model can take every text."""
    if len(texts) == 0:
        raise DagerError("the batch is empty: give at least one text")
    ids = encode(model.tokenizer, texts, max_length)
    special = model.tokenizer.num_special_tokens_to_add()
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


def _masked(model: LanguageModel, ids: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Corrupted inputs and targets of a batch, after checking that the model can take them."""
    inputs, targets = masked_inputs(model.tokenizer, ids, seed)
    _check_vocabulary(model, inputs)
    if all(target == IGNORED for row in targets for target in row):
        raise DagerError("task 'masked' needs a token to mask: every text has special tokens only")
    return inputs, targets


def _classes(labels: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
    """The labels as plain integers, alternating when none are given."""
    if labels is None:
        return tuple(index % 2 for index in range(batch_size))
    if len(labels) != batch_size:
        raise DagerError(f"there are {len(labels)} labels for {batch_size} texts: give one per text")
    try:
        classes = tuple(operator.index(label) for label in labels)
    except TypeError:
        raise DagerError("labels must be integers: number the classes from 0") from None
    if min(classes) < 0:
        raise DagerError(f"label {min(classes)} is negative: number the classes from 0")
    return classes
