"""One step of the client: a private batch and a loss become an update (chapter `01_gradients_leak`).

The client runs the model classes of transformers unmodified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.client.adapters import with_adapter
from dager_tutorial.client.batch import Padded, PrivateBatch, Truth, pad, read_batch
from dager_tutorial.client.config import DTYPES, ClientConfig
from dager_tutorial.client.dropout import dropping
from dager_tutorial.client.masking import IGNORED
from dager_tutorial.client.sharing import check_memory, shared_parameters
from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.heads import Head, choose_pad, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.streaming import is_absent, is_streamed, recomputed
from dager_tutorial.models.training import in_dtype, requiring_grad
from dager_tutorial.update import Update


def client_update(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
) -> Update:
    """Compute the update that a client with this batch would send in one step of FedSGD.

    The model is in evaluation mode unless dropout is asked for, and left as it was: no parameter requires a gradient.

    Args:
        model: The shared model.
        texts: The private batch.
        labels: One class per text, from 0; alternating 0 and 1 when left out. Only classification uses them.
        config: What the client does; the defaults of `ClientConfig` when left out.

    Returns:
        Detached gradients on the CPU, each of its parameter's shape, in the client's dtype. Shared parameters that the
        loss does not depend on are left out, as transformers leaves their ``.grad`` at None.

    Raises:
        DagerError: A text, label or shared name cannot be used, the model cannot do what is asked, or the gradient
            overflows the dtype.

    See chapter `01_gradients_leak`.
    """
    return play(model, texts, labels, config=config)[0]


def play(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
) -> tuple[Update, Truth]:
    """Compute a client's update, and keep what it knows for `evaluation.metrics.score`.

    Args:
        model: See `client_update`.
        texts: See `client_update`.
        labels: See `client_update`.
        config: See `client_update`.

    Returns:
        What the server receives, and what it must never see. Both come from one tokenisation of the batch.

    Raises:
        DagerError: See `client_update`.
    """
    config = config or ClientConfig()
    batch = read_batch(model, texts, labels, config)
    return _update(model, batch, config), batch.truth(model, config.task)


def head_of(config: ClientConfig, labels: Sequence[int] | None = None) -> Head:
    """The head that the server hands out to such a client: all that it must know to simulate a step.

    Args:
        config: What the client does.
        labels: The classes of its batch: there are as many as the largest tells, at least two.
    """
    return Head(config.task, max([1, *(labels or ())]) + 1, config.seed, config.head_std)


def _update(model: LanguageModel, batch: PrivateBatch, config: ClientConfig) -> Update:
    """Forward and backward pass of the client's network."""
    network = ready(model, batch, config)
    with training(network, config):
        gradients = gradients_of(network, batch, config)
    return as_update(gradients, model, config.dtype)


class Ready(NamedTuple):
    """A client's network before a step.

    Attributes:
        client: The network, its head included.
        adapter: The adapter of the backbone inside it.
        shared: The parameters whose gradients are sent, by name.
    """

    client: PreTrainedModel
    adapter: Adapter
    shared: dict[str, nn.Parameter]


def ready(model: LanguageModel, batch: PrivateBatch, config: ClientConfig) -> Ready:
    """The network that takes a step on a batch.

    Args:
        model: The shared model, whose parameters it has.
        batch: The texts.
        config: What the client does.

    Raises:
        DagerError: See `client_update`.
    """
    backbone = in_dtype(model.network, getattr(torch, config.dtype))
    if model.adapter:
        backbone = with_adapter(backbone, model.adapter)
    adapter, client = adapter_for(backbone), trainee(model, backbone, batch, config)
    shared = shared_parameters(client, adapter, config.share)
    if is_streamed(backbone):
        check_memory(shared, config.share)
    return Ready(client, adapter, shared)


@contextmanager
def training(network: Ready, config: ClientConfig) -> Iterator[None]:
    """Let a network take steps: what is sent requires a gradient, dropout is as it shall be.

    Args:
        network: The client's.
        config: What the client does.

    Raises:
        DagerError: The network has no dropout where some is asked for.
    """
    client, streamed = network.client, is_streamed(network.adapter.network)
    dropout = dropping(client, config.dropout, config.seed)
    with requiring_grad(network.shared), dropout, recomputed(client) if streamed else nullcontext():
        yield


def gradients_of(network: Ready, batch: PrivateBatch, config: ClientConfig) -> dict[str, Tensor]:
    """The gradients of the loss of a batch in the shared parameters it depends on, detached, on the CPU.

    Args:
        network: The client's, in `training`.
        batch: The texts.
        config: What the client does.

    Raises:
        DagerError: The loss depends on none of them.
    """
    loss, shared = loss_of(network, batch, config), network.shared
    if not loss.requires_grad:
        raise DagerError(f"the loss depends on no parameter of share {quote(config.share)}: share others")
    found = torch.autograd.grad(loss, list(shared.values()), allow_unused=True)
    return {name: gradient.detach().cpu() for name, gradient in zip(shared, found, strict=True) if gradient is not None}


def loss_of(network: Ready, batch: PrivateBatch, config: ClientConfig) -> Tensor:
    """The loss of a batch, where the network lies.

    Args:
        network: The client's, in `training`.
        batch: The texts.
        config: What the client does.
    """
    client = network.client
    padded = pad(batch, client.config.pad_token_id, config.padding_side, client.device)
    return batch_loss(client, network.adapter, padded, batch.labels, config)


def trainee(
    model: LanguageModel, backbone: PreTrainedModel, batch: PrivateBatch, config: ClientConfig
) -> PreTrainedModel:
    """The network that the client trains: its backbone under the head of the task, told what it pads with.

    Args:
        model: The shared model.
        backbone: Its network, or the client's own copy of it.
        batch: The private texts, none of which ends in the pad.
        config: What the client does.
    """
    client = with_head(backbone, model.tokenizer, head_of(config, batch.labels))
    choose_pad(client, model.tokenizer, batch.inputs)
    return client


def batch_loss(
    client: PreTrainedModel, adapter: Adapter, padded: Padded, classes: Sequence[int], config: ClientConfig
) -> Float[Tensor, ""]:
    """The scalar loss of a batch, by the client's unmodified forward pass.

    Args:
        client: The client's network.
        adapter: The adapter of the backbone inside it.
        padded: The texts.
        classes: Their labels.
        config: What the client does.
    """
    # Positions count real tokens, so that behind left padding a text stands where it stands alone.
    inputs = {
        "input_ids": padded.ids,
        "attention_mask": padded.mask,
        "position_ids": adapter.position_ids(padded.mask),
    }
    if config.loss == "frobenius":
        hidden = adapter.network(**inputs, use_cache=False).last_hidden_state  # batch x length x width
        rows = hidden[padded.mask.bool()]
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum() / len(padded.ids)
    return client(**inputs, labels=_labels(padded, classes, config.task), use_cache=False).loss


def _labels(padded: Padded, classes: Sequence[int], task: str) -> Tensor:
    """What the loss compares with: classes (batch), or token ids (batch x length).

    The causal loss shifts its labels itself. Pads are no targets, nor is a text's first token, which transformers
    would otherwise predict from a pad behind left padding.
    """
    if task == "classification":
        return torch.tensor(classes, device=padded.ids.device)
    if padded.targets is not None:
        return padded.targets
    return padded.ids.masked_fill((padded.mask == 0) | (padded.mask.cumsum(-1) == 1), IGNORED)


def as_update(gradients: dict[str, Tensor], model: LanguageModel, dtype: str) -> Update:
    """The update; where a gradient is not finite, the error says why and what to do.

    Args:
        gradients: By name.
        model: The shared model.
        dtype: In which the client trains.

    Raises:
        DagerError: A gradient is not finite.
    """
    try:
        return Update(gradients, model=model.name)
    except UpdateError as error:
        broken = _not_finite(gradients.items())
        if broken is None:
            raise
        reason = _reason(model.network, dtype)
        raise DagerError(f"in dtype {dtype!r} the gradient of {quote(broken)} {reason}") from error


def _reason(network: PreTrainedModel, dtype: str) -> str:
    """Why a gradient is not finite, and which dtypes reach further."""
    weight = _not_finite(network.named_parameters())
    if weight is not None:
        return f"is not finite, as the model's {quote(weight)} is not: load other weights"
    largest = torch.finfo(getattr(torch, dtype)).max
    wider = [name for name in sorted(DTYPES) if torch.finfo(getattr(torch, name)).max > largest]
    return f"overflows: train with {' or '.join(wider)}" if wider else "overflows: give the model smaller weights"


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, tensor in tensors if not is_absent(tensor) and not tensor.isfinite().all()), None)
