"""A client of FedAvg: several epochs over its own texts in mini-batches, and the weights' difference is what travels.

Chapter `12_federated`.

The client trains the model classes of transformers unmodified, with the optimisers of torch unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.client.batch import PrivateBatch, Truth, mini_batches, pad, read_batch
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.constraints import OneOf, Within, check_options, option
from dager_tutorial.client.dropout import dropping
from dager_tutorial.client.sharing import shared_parameters
from dager_tutorial.client.step import batch_loss, trainee
from dager_tutorial.errors import DagerError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.streaming import is_streamed
from dager_tutorial.models.training import own_copy
from dager_tutorial.update import Update

OPTIMIZERS = ("sgd", "momentum", "adamw")
MOMENTUM = 0.9


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains before it sends what its weights moved.

    Attributes:
        epochs: Passes over the client's texts.
        mini_batch: Texts of one step, in the texts' order; the last step of an epoch may have fewer.
        learning_rate: Step size.
        optimizer: `sgd`, `momentum` (0.9) or `adamw` (torch's defaults, with weight decay).
        frozen_embeddings: Whether token and position embeddings stay as they are, and so are not sent.
        tells_rate: Whether the server is told the learning rate.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> LocalTraining(epochs=0)
        Traceback (most recent call last):
        dager_tutorial.errors.DagerError: epochs is 0: give a whole number from 1 to 1000000

    Chapter `12_federated`.
    """

    epochs: int = option(1, Within(1, 10**6), "Passes over the client's texts.")
    mini_batch: int = option(4, Within(1, 10**6), "Texts of one step.")
    learning_rate: float = option(1e-4, Within(1e-12, 1e3, whole=False), "Step size.")
    optimizer: str = option("sgd", OneOf(OPTIMIZERS), "Optimiser.")
    frozen_embeddings: bool = option(False, Within(0, 1), "Whether embeddings stay as they are.")
    tells_rate: bool = option(True, Within(0, 1), "Whether the server is told the learning rate.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)


def local_update(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
    training: LocalTraining | None = None,
) -> Update:
    """Train a copy of the model on private texts and return what its weights moved: one client's round of FedAvg.

    Args:
        model: The shared model, which stays as it is.
        texts: The client's texts.
        labels: See `step.client_update`.
        config: What the client does in a step; its dtype is that of the weights, too.
        training: How many steps it takes, and which.

    Returns:
        New weights minus old weights (kind `delta`), float32 (float64 for a float64 client), on the CPU. Parameters
        that were not trained are left out; those that did not move are zero.

    Raises:
        DagerError: See `step.client_update`; or the weights are no longer finite.

    Chapter `12_federated`.
    """
    return play_locally(model, texts, labels, config=config, training=training)[0]


def play_locally(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
    training: LocalTraining | None = None,
) -> tuple[Update, Truth]:
    """Compute a client's round of FedAvg, and keep what it knows for `evaluation.metrics.score`.

    Args:
        model: See `local_update`.
        texts: See `local_update`.
        labels: See `local_update`.
        config: See `local_update`.
        training: See `local_update`.

    Returns:
        What the server receives, and what it must never see.

    Raises:
        DagerError: See `local_update`.
    """
    config, training = config or ClientConfig(), training or LocalTraining()
    batch = read_batch(model, texts, labels, config)
    return _trained(model, batch, config, training), batch.truth(model, config.task)


def summed(updates: Sequence[Update]) -> Update:
    """The sum of several clients' updates, which is all that secure aggregation lets the server see.

    Args:
        updates: Of one kind, model and learning rate; a parameter that some did not send counts as zero there.

    Raises:
        DagerError: There is none, or they do not belong together.

    Chapter `12_federated`.
    """
    if not updates:
        raise DagerError("there is no update to sum: give those of the clients")
    first = updates[0]
    if any(
        (each.kind, each.learning_rate, each.model) != (first.kind, first.learning_rate, first.model)
        for each in updates
    ):
        raise DagerError("the updates differ in kind, learning rate or model: sum those of one round")
    total: dict[str, Tensor] = {}
    for update in updates:
        for name, tensor in update.gradients.items():
            if name in total and total[name].shape != tensor.shape:
                raise DagerError(f"tensor {name!r} has different shapes in the updates: sum those of one model")
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return Update(total, kind=first.kind, learning_rate=first.learning_rate, model=first.model)


def _trained(model: LanguageModel, batch: PrivateBatch, config: ClientConfig, training: LocalTraining) -> Update:
    """Train the client's own copy, and compare it with what it was."""
    if is_streamed(model.network):
        raise DagerError("local training moves all weights, and this model's are read from disk: load it whole")
    backbone = own_copy(model.network, getattr(torch, config.dtype))
    adapter, client = adapter_for(backbone), trainee(model, backbone, batch, config)
    trained = _trainable(client, training.frozen_embeddings)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    _train(client, adapter, batch, config, training, trained)
    sent = shared_parameters(client, adapter, config.share)
    wide = torch.promote_types(before[next(iter(before))].dtype, torch.float32)
    moved = {
        name: (parameter.detach().to(wide) - before[name].to(wide)).cpu()
        for name, parameter in trained.items()
        if name in sent and parameter.grad is not None
    }
    if not all(bool(delta.isfinite().all()) for delta in moved.values()):
        raise DagerError(f"training diverges at learning rate {training.learning_rate:g}: give a smaller one")
    rate = training.learning_rate if training.tells_rate else None
    return Update(moved, kind="delta", learning_rate=rate, model=model.name)


def _trainable(client: PreTrainedModel, frozen_embeddings: bool) -> dict[str, nn.Parameter]:
    """The parameters that training moves."""
    frozen: set[int] = set()
    if frozen_embeddings:
        tables = (module for module in client.modules() if isinstance(module, nn.Embedding))
        frozen = {id(table.weight) for table in tables}
    return {name: parameter for name, parameter in client.named_parameters() if id(parameter) not in frozen}


def _train(
    client: PreTrainedModel,
    adapter: Adapter,
    batch: PrivateBatch,
    config: ClientConfig,
    training: LocalTraining,
    trained: Mapping[str, nn.Parameter],
) -> None:
    """All steps of all epochs, in place."""
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = _optimizer(training, list(trained.values()))
    with dropping(client, config.dropout, config.seed):
        for part in training.epochs * tuple(mini_batches(batch, training.mini_batch)):
            padded = pad(part, client.config.pad_token_id, config.padding_side, client.device)
            batch_loss(client, adapter, padded, part.labels, config).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def _optimizer(training: LocalTraining, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of torch, with its defaults but for the learning rate."""
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=training.learning_rate)
    momentum = MOMENTUM if training.optimizer == "momentum" else 0.0
    return torch.optim.SGD(parameters, lr=training.learning_rate, momentum=momentum)
