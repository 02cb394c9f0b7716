"""Which gradients a client sends, and only these are computed (chapter `01_gradients_leak`)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from dager_tutorial.errors import DagerError, quote
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV
from dager_tutorial.stopwatch import available_memory


def shared_parameters(client: PreTrainedModel, adapter: Adapter, share: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters whose gradients the client sends, by the names transformers gives them.

    Args:
        client: The client's network.
        adapter: The adapter of the backbone inside it.
        share: See `config.ClientConfig`.

    Raises:
        DagerError: A name is no parameter of the client's.
    """
    parameters = dict(client.named_parameters())
    if share == "all":
        return parameters
    if share == "attention":
        attention = _attention_parameters(adapter)
        return {name: parameter for name, parameter in parameters.items() if id(parameter) in attention}
    chosen: set[str] = set()
    for pattern in share:
        named = fnmatch.filter(parameters, pattern) if "*" in pattern else {pattern} & parameters.keys()
        if not named:
            raise DagerError(
                f"share names {quote(pattern)}, which the client's {client.config.model_type} model has not: "
                f"use names such as {next(iter(parameters))!r}"
            )
        chosen.update(named)
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def check_memory(shared: dict[str, nn.Parameter], share: str | Sequence[str]) -> None:
    """Refuse gradients that do not fit into memory beside a model that is there for being too large.

    Args:
        shared: The parameters whose gradients are sent.
        share: How the user chose them.

    Raises:
        DagerError: They do not fit.
    """
    wanted, free = sum(each.numel() * each.element_size() for each in shared.values()), available_memory()
    if wanted > free:
        raise DagerError(
            f"the gradients of share {quote(share)} take {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "share fewer, such as 'layers.0.self_attn.*' (in any model: names with * for what varies)"
        )


def _attention_parameters(adapter: Adapter) -> set[int]:
    """The identities of weights and biases of every block's query, key, value and attention output maps."""
    return {
        id(parameter)
        for block in range(adapter.num_blocks)
        for kind in (QKV, ATTENTION_OUTPUT)
        for module in adapter.linear_maps(block, kind)
        for parameter in module.parameters()
    }
