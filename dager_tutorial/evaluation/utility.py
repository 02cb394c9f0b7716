"""What a defence costs: a small task, learned by updates that are defended one and all."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dager_tutorial.client.batch import PrivateBatch, mini_batches, pad, read_batch
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.constraints import Within, check_options, option
from dager_tutorial.client.defenses.chain import Left, protected
from dager_tutorial.client.defenses.noise import Noise, generator
from dager_tutorial.client.private import Accounting, accounted, private_gradients
from dager_tutorial.client.step import Ready, gradients_of, ready, training
from dager_tutorial.data import Example
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.changes import selections
from dager_tutorial.evaluation.defending import Cell
from dager_tutorial.evaluation.parts import EMBEDDINGS, parts_of_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.training import own_copy
from dager_tutorial.update import Update

TEST_BATCH = 32


@dataclass(frozen=True)
class Training:
    """How the task is learned: one client's update a step, to which the server applies AdamW. Embeddings are frozen.

    Attributes:
        steps: How many.
        batch_size: Texts of a step on average: each is in it by chance (Poisson sampling), which the promises of DP-SGD
            ask for.
        learning_rate: Of AdamW.
        tests: Texts that are held out.

    Raises:
        DagerError: An option may not have its value.
    """

    steps: int = option(60, Within(1, 10**6), "Steps.")
    batch_size: int = option(8, Within(1, 10**6), "Texts of a step on average.")
    learning_rate: float = option(1e-4, Within(1e-12, 10, whole=False), "Of AdamW.")
    tests: int = option(96, Within(1, 10**6), "Texts held out.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)


def utility_row(
    model: LanguageModel, examples: Sequence[Example], cell: Cell, seed: int, how: Training
) -> dict[str, Any]:
    """Fine-tune a copy of the model on one split of labelled texts, and count what it gets right.

    Args:
        model: What is fine-tuned; it stays as it is.
        examples: The texts, shuffled and split by the seed.
        cell: The defence of every update. Of DP-SGD, sampling and steps are those of the training.
        seed: Seed of split, head, batches and of all that the defence draws.
        how: How it is learned.

    Returns:
        JSON types by name: `right` of `tests` texts, seconds in all, mean bytes and norm of an update, and what the
        accountant says.

    Raises:
        DagerError: There are too few texts, or training diverges.
    """
    start = time.perf_counter()
    order = random.Random(seed).sample(list(examples), len(examples))
    tests, learned = order[: how.tests], order[how.tests :]
    if len(learned) < how.batch_size:
        raise DagerError(f"{len(examples)} texts leave {len(learned)} to learn from: hold out fewer than {how.tests}")
    config = ClientConfig(seed=seed, head_std=0.02, dropout=cell.protection.dropout)
    whole = replace(model, network=own_copy(model.network, torch.float32))
    batch = _batch(whole, learned, config)
    network = _trainable(whole, ready(whole, batch, config), cell)
    rate = how.batch_size / len(learned)
    asked = cell.protection.privacy
    counted = None if asked is None else accounted(replace(asked, sample_rate=rate, steps=how.steps))
    with training(network, config):
        sent = list(_learn(network, batch, config, cell, counted, how))
    right = _right(whole, network, _batch(whole, tests, config), config)
    return {
        "right": right,
        "tests": len(tests),
        "texts": len(learned),
        "seconds": time.perf_counter() - start,
        "bytes": round(sum(left.bytes for left in sent) / len(sent)),
        "gradient_norm": sum(left.norm for left in sent) / len(sent),
        **({} if counted is None else counted.to_json()),
    }


def _batch(model: LanguageModel, examples: Sequence[Example], config: ClientConfig) -> PrivateBatch:
    return read_batch(model, [each.text for each in examples], [each.label for each in examples], config)


def _trainable(model: LanguageModel, network: Ready, cell: Cell) -> Ready:
    """The network with what is trained: not the embeddings, and of the rest what the client sends."""
    update = Update({name: parameter.detach() for name, parameter in network.shared.items()})
    parts = parts_of_update(model, update)
    names = {name for name, part in parts.items() if part.kind != EMBEDDINGS}
    if cell.sends:
        names &= selections(model, update)[cell.sends].names
    return network._replace(shared={name: each for name, each in network.shared.items() if name in names})


def _learn(
    network: Ready,
    batch: PrivateBatch,
    config: ClientConfig,
    cell: Cell,
    counted: Accounting | None,
    how: Training,
) -> Iterator[Left]:
    """All steps, in place; what is left of each update."""
    optimizer = torch.optim.AdamW(list(network.shared.values()), lr=how.learning_rate)
    chance, draw = random.Random(config.seed), generator(config.seed)
    for step in range(how.steps):
        drawn = [place for place in range(len(batch.texts)) if chance.random() < how.batch_size / len(batch.texts)]
        gradients = _step(network, _part(batch, drawn), config, counted, how.batch_size, draw)
        if not all(bool(each.isfinite().all()) for each in gradients.values()):
            raise DagerError(f"training diverges at learning rate {how.learning_rate:g}: give a smaller one")
        sent, left = protected(Update(gradients), cell.protection.chain, config.seed * how.steps + step)
        for name, parameter in network.shared.items():
            parameter.grad = sent.gradients[name].to(parameter.dtype)
        optimizer.step()
        yield left


def _step(
    network: Ready, part: PrivateBatch, config: ClientConfig, counted: Accounting | None, size: int, draw: Any
) -> dict[str, Tensor]:
    """The gradients of a step, all of them; zero, or noise alone, where chance drew no text."""
    zeros = {name: torch.zeros(each.shape) for name, each in network.shared.items()}
    if not part.texts:
        return zeros if counted is None else Noise(counted.deviation(size))(zeros, draw)
    if counted is None:
        return zeros | gradients_of(network, part, config)
    return zeros | private_gradients(network, part, config, counted, draw, size)[0]


def _part(batch: PrivateBatch, places: Sequence[int]) -> PrivateBatch:
    """Some texts of a batch."""
    return PrivateBatch(
        tuple(batch.texts[place] for place in places),
        tuple(batch.labels[place] for place in places),
        [batch.inputs[place] for place in places],
        None,
    )


@torch.no_grad()
def _right(model: LanguageModel, network: Ready, tests: PrivateBatch, config: ClientConfig) -> int:
    """How many texts the network puts in their class, in evaluation mode."""
    right = 0
    for part in mini_batches(tests, TEST_BATCH):
        padded = pad(part, network.client.config.pad_token_id, config.padding_side, model.device)
        places = network.adapter.position_ids(padded.mask)
        logits = network.client(input_ids=padded.ids, attention_mask=padded.mask, position_ids=places).logits
        right += int((logits.argmax(1).cpu() == torch.tensor(part.labels)).sum())
    return right
