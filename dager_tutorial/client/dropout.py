"""Dropout as a client trains with it: some inputs of every layer are zeroed by chance (chapter `14_defences`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from dager_tutorial.client.defenses.noise import generator
from dager_tutorial.errors import DagerError


@contextmanager
def dropping(network: PreTrainedModel, probability: float, seed: int) -> Iterator[None]:
    """Let a network train as it does on most platforms, in training mode, for a while.

    Every dropout that the architecture has gets the probability: GPT-2 and BERT drop embeddings, attention and what a
    block adds, Llama attention weights alone.

    Args:
        network: The client's network, in evaluation mode.
        probability: Of an entry to be zeroed; 0 leaves the network in evaluation mode.
        seed: Seed of the masks, which differ from pass to pass.

    Raises:
        DagerError: The network has no dropout.

    Chapter `14_defences`.
    """
    if not probability:
        yield
        return
    modules = list(network.modules())
    before = [(module, name, getattr(module, name)) for module in modules for name in _settings(module)]
    if not before:
        raise DagerError(f"{network.config.model_type} has no dropout: train it without")
    training = [(module, module.training) for module in modules]
    try:
        network.train()
        for module, name, _ in before:
            setattr(module, name, probability)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(generator(seed).initial_seed())
            yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for module, mode in training:
            module.training = mode


def _settings(module: nn.Module) -> tuple[str, ...]:
    """Where a module keeps its probability: a layer of its own, or a number that its attention is handed."""
    if isinstance(module, nn.Dropout):
        return ("p",)
    return ("attention_dropout",) if isinstance(getattr(module, "attention_dropout", None), int | float) else ()
