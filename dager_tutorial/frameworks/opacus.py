"""Opacus: the gradient as a differentially private step sends it: clipped text by text, summed and noised.

Chapter `12_federated`. Needs the extra `opacus`.

What works, with Opacus 1.6 and a classifier of transformers: the modes `hooks` and `functorch`, with Llama as it is,
with GPT-2 and BERT where the client hands over `position_ids` for every text (else transformers counts positions once
for the batch, and Opacus stops: `stack expects each tensor to be equal size`). GPT-2's `Conv1D` needs nothing: Opacus
takes functorch where it has no rule of its own. The mode `ghost` takes Llama and neither GPT-2 nor BERT; `ew` none.
"""

from __future__ import annotations

from collections.abc import Callable

from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.hooks import RemovableHandle

from dager_tutorial.frameworks.hook import capture_steps
from dager_tutorial.update import Update


def capture_private_steps(
    optimizer: DPOptimizer, network: nn.Module, receive: Callable[[Update], object], *, model: str | None = None
) -> RemovableHandle:
    """Hand over the gradient of every step that a private optimiser takes, as it is after clipping and noise.

    Opacus has one step hook of its own, and `make_private` gives it to the accountant: to attach another would end the
    accounting without a word. So the optimiser within is listened to.

    Args:
        optimizer: What `make_private` returns.
        network: What it returns, or what it was given: the names are those of the network within.
        receive: Called with each update: once a logical batch, however many physical ones it took.
        model: The model's name, for people to read.

    Returns:
        A handle; `remove()` ends it.

    Example::

        engine = PrivacyEngine()
        network, optimizer, loader = engine.make_private(module=network, optimizer=optimizer, data_loader=loader,
                                                         noise_multiplier=1.0, max_grad_norm=0.1)
        capture_private_steps(optimizer, network, lambda update: save_beside(update, "captured", "step"))

    Chapter `12_federated`.
    """
    inner = getattr(network, "_module", network)
    return capture_steps(optimizer.original_optimizer, inner, receive, model=model)
