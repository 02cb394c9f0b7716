"""Which part of the network each tensor of an update belongs to: what was sent, and what could be left out."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import own_name, part_of
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV
from dager_tutorial.update import Update

EMBEDDINGS, ATTENTION, FEED_FORWARD, OTHERS, HEAD = "embeddings", "attention", "MLP", "norms and others", "head"
KINDS = (EMBEDDINGS, ATTENTION, FEED_FORWARD, OTHERS, HEAD)


class Part(NamedTuple):
    """Where a parameter stands in the network.

    Attributes:
        kind: One of `KINDS`.
        block: Index of its block; None outside the blocks.
    """

    kind: str
    block: int | None = None


def parts_of_network(model: LanguageModel) -> dict[str, Part]:
    """The part of every parameter of the backbone, by its own name, in the network's order.

    Args:
        model: The model both sides know.

    Raises:
        ModelError: The architecture has no adapter.
    """
    adapter = adapter_for(model.network)
    known = _known(model, adapter)
    return {name: known.get(id(each), Part(OTHERS)) for name, each in model.network.named_parameters()}


def parts_of_update(model: LanguageModel, update: Update) -> dict[str, Part]:
    """The part of every tensor of an update, by the update's own name; an adapter's are those of the map it adapts.

    Args:
        model: The model both sides know.
        update: What the client sent.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.
    """
    parts = parts_of_network(model)
    if any(map(part_of, update.gradients)):
        return {name: _adapted(name, model, parts) for name in update.gradients}
    own = {id(tensor): parts[name] for name, tensor in update.for_backbone(model.network).items()}
    return {name: own.get(id(tensor), Part(HEAD)) for name, tensor in update.gradients.items()}


def _adapted(name: str, model: LanguageModel, parts: dict[str, Part]) -> Part:
    """The part of an adapter's tensor; what is no adapter's is a head's."""
    found = part_of(name)
    own = None if found is None else own_name(found[0], model.adapter)
    return Part(HEAD) if own is None else parts[f"{own}.weight"]


def _known(model: LanguageModel, adapter: Adapter) -> dict[int, Part]:
    """The part of parameters by their identity: of the blocks and of the embedding tables."""
    found: dict[int, Part] = {}
    for module in model.network.modules():
        if isinstance(module, nn.Embedding):
            found[id(module.weight)] = Part(EMBEDDINGS)
    for block, module in enumerate(adapter.blocks):
        found |= {id(each): Part(OTHERS, block) for each in module.parameters()}
        for kind, taps in ((ATTENTION, (QKV, ATTENTION_OUTPUT)), (FEED_FORWARD, (MLP, MLP_OUTPUT))):
            maps = (one for tap in taps for one in adapter.linear_maps(block, tap))
            found |= {id(each): Part(kind, block) for one in maps for each in one.parameters()}
    return found
