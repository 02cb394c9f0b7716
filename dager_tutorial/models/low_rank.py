"""Low-rank adapters (LoRA): what the server broadcasts of one, and the network that it makes of a backbone.

Chapter `13_adapters`.

An adapted map is `y = W x + scaling * B (A x)`: W is frozen, A (r x inputs) and B (outputs x r) are trained and travel.
Both sides know them. The backbone that candidates are run through is the merged one, `W + scaling * B A`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dager_tutorial.errors import ModelError, quote
from dager_tutorial.models.streaming import is_absent

_WRAPPED = re.compile(r"\.(default|modules_to_save\.default|base_layer)(?=\.|$)")
_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """One adapted map, as the server broadcast it.

    Attributes:
        base: The frozen weight, as its module stores it.
        down: A.
        up: B; zero in a fresh adapter.
        scaling: The factor on `B A`, peft's `lora_alpha / r` (or over its root).
        input_first: True where the weight is stored inputs x outputs (the Conv1D of GPT-2).
    """

    base: Float[Tensor, "_ _"]
    down: Float[Tensor, "r inputs"]
    up: Float[Tensor, "outputs r"]
    scaling: float
    input_first: bool

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of `B A`, stored as the frozen weight is."""
        shape = (self.up.shape[0], self.down.shape[1])
        return shape[::-1] if self.input_first else shape

    def merged(self) -> Float[Tensor, "_ _"]:
        """`W + scaling * B A`, stored as the frozen weight is."""
        change = self.scaling * (self.up.double() @ self.down.double())
        return (self.base.double() + (change.T if self.input_first else change)).to(self.base.dtype)


LowRankMaps = Mapping[str, LowRank]
"""Adapted maps by the backbone's own names of their modules, `h.0.attn.c_attn` for one."""


def merged(network: PreTrainedModel, maps: LowRankMaps) -> PreTrainedModel:
    """A copy of a backbone whose adapted maps have their merged weights; all others are shared with the original.

    Args:
        network: The headless model.
        maps: What the server broadcast.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()}
    for name, each in maps.items():
        memo[id(network.get_submodule(name).weight)] = nn.Parameter(each.merged(), requires_grad=False)
    return copy.deepcopy(network, memo)


def low_rank(network: PreTrainedModel, name: str, down: Tensor, up: Tensor, scaling: float) -> tuple[str, LowRank]:
    """One adapted map of a backbone.

    Args:
        network: The headless model, its weights those that stay frozen.
        name: The map's module, under any prefix.
        down: A, r x inputs.
        up: B, outputs x r.
        scaling: The factor on `B A`.

    Returns:
        The backbone's own name of the module, and the map.

    Raises:
        ModelError: The backbone has no such map, or one of another shape.
    """
    own = own_name(name, dict(network.named_modules()))
    weight: Tensor | None = None if own is None else getattr(network.get_submodule(own), "weight", None)
    if weight is None or weight.dim() != 2 or is_absent(weight):
        raise ModelError(f"the adapter is of {quote(name)}, of which this model holds no weight: name its base model")
    first = _input_first(network.get_submodule(str(own)))
    shape = (up.shape[0], down.shape[1])
    if up.shape[1] != down.shape[0] or shape != tuple(weight.T.shape if first else weight.shape):
        raise ModelError(f"the adapter of {quote(name)} is for a map of shape {shape}: name its base model")
    down, up = (part.detach().to(weight.device, torch.float32) for part in (down, up))
    return str(own), LowRank(weight.detach(), down, up, float(scaling), first)


def own_name(name: str, modules: Container[str]) -> str | None:
    """The backbone's own name of a module that is known by a longer one; None where it is no module of the backbone.

    Args:
        name: Its name inside other modules.
        modules: The backbone's own names.

    Example:
        >>> own_name("base_model.model.transformer.h.0.attn.c_attn", {"h", "h.0.attn.c_attn"})
        'h.0.attn.c_attn'
    """
    parts = name.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in modules), None)


def wire_name(name: str) -> str:
    """The name by which peft's files know a parameter.

    Example:
        >>> wire_name("transformer.h.0.attn.c_attn.lora_A.default.weight")
        'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight'
    """
    return _PREFIX + _WRAPPED.sub("", name).removeprefix(_PREFIX)


def part_of(name: str) -> tuple[str, str] | None:
    """The module and the part, `A` or `B`, that a parameter's name speaks of; None where it is no adapter's.

    Args:
        name: As `named_parameters()` of a peft model has it, or as peft's files do.

    Example:
        >>> part_of("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight")
        ('transformer.h.0.attn.c_attn', 'B')
    """
    found = _PART.match(_WRAPPED.sub("", name).removeprefix(_PREFIX))
    return None if found is None else (found["module"], found["part"])


def maps_of(adapted: nn.Module, network: PreTrainedModel) -> dict[str, LowRank]:
    """Read the adapter off a live model that peft wrapped or injected into.

    Args:
        adapted: The peft model. Its own frozen weights count, which some initialisations change (pissa, olora).
        network: The headless model it was made of, for the names.

    Returns:
        The adapted maps by the backbone's own names.

    Raises:
        ModelError: It holds no LoRA adapter, several, or one of another kind (DoRA, adapted embeddings).
    """
    own, found = dict(network.named_modules()), dict[str, LowRank]()
    for name, module in adapted.named_modules():
        if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            continue
        _check_supported(name, module)
        key, (inner, down) = own_name(name, own), next(iter(module.lora_A.items()))
        if key is None:
            continue
        base = module.base_layer
        weights = (base.weight.detach(), down.weight.detach().clone(), module.lora_B[inner].weight.detach().clone())
        found[key] = LowRank(*weights, float(module.scaling[inner]), _input_first(base))
        if found[key].shape != tuple(base.weight.shape):
            raise ModelError(
                f"the adapter of {quote(name)} does not have its map's shape: choose another initialisation"
            )
    if not found:
        raise ModelError("the model holds no LoRA adapter of this backbone: give what peft's get_peft_model returned")
    return found


def _input_first(module: nn.Module) -> bool:
    """Whether a map stores its weight inputs x outputs."""
    return isinstance(module, Conv1D)


def _check_supported(name: str, module: Any) -> None:
    """Raise where the map is not `W x + scaling * B (A x)`."""
    if len(module.lora_A) != 1:
        raise ModelError(f"{quote(name)} holds {len(module.lora_A)} adapters: give a model with one")
    if len(getattr(module, "lora_magnitude_vector", ())):
        raise ModelError(f"{quote(name)} is adapted by DoRA, whose magnitudes are not read: use plain LoRA")
