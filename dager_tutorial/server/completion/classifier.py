"""What enters the map to the classes, and how it moves with the last block.

Where a head is one linear map, nothing of this depends on the head's numbers: the server has it before it knows them.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dager_tutorial.models.tap import MLP_OUTPUT, precise
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.passes import by_parts


@dataclass(frozen=True)
class ClassMap:
    """The linear map of a head.

    Attributes:
        module: It.
        weight: The full name of its weight.
        bias: The full name of its bias, None where it has none.
    """

    module: nn.Linear
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Views:
    """Each text, seen from the map to the classes; all float64 but the slopes.

    Attributes:
        inputs: What enters the last block's MLP output map at the token that the loss reads.
        features: What enters the map to the classes.
        slopes: Derivative of the features in what leaves the MLP output map, in the network's dtype.
    """

    inputs: Float[Tensor, "texts inner"]
    features: Float[Tensor, "texts features"]
    slopes: Float[Tensor, "texts features width"]


def class_map_of(simulator: Simulator) -> ClassMap | None:
    """The map to the classes; None where the head has a layer before it.

    Args:
        simulator: Repeats the client's step, with any head.
    """
    prefix = f"{simulator.network.base_model_prefix}."
    outside = [
        (name, module)
        for name, module in simulator.network.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(prefix)
    ]
    if len(outside) != 1:
        return None
    ((name, module),) = outside
    return ClassMap(module, f"{name}.weight", None if module.bias is None else f"{name}.bias")


def views_of(simulator: Simulator, texts: Sequence[Ids], module: nn.Linear) -> Views:
    """See texts from the map to the classes.

    Args:
        simulator: Repeats the client's step, with any head.
        texts: Token ids, at least one text.
        module: The map.
    """
    found = by_parts(simulator.network, texts, lambda part: zip(*_views(simulator, part, module), strict=True))
    inputs, features, slopes = zip(*found, strict=True)
    return Views(torch.stack(inputs), torch.stack(features), torch.stack(slopes))


def _views(simulator: Simulator, texts: list[Ids], module: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, features and slopes of texts that fit in at once."""
    entered: list[Tensor] = []
    adapter = simulator.adapter
    handle = module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        with simulator.cut_behind(adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT)) as seen:
            logits, _ = simulator.logits(texts)
            features, read = _at_the_token(entered[0], seen["output"], logits)
            slopes = _slopes(features, seen["output"], read)
    finally:
        handle.remove()
    inputs = seen["inputs"][torch.arange(len(texts)), read]
    return precise(inputs.detach()).cpu(), precise(features.detach()).cpu(), slopes.cpu()


def _at_the_token(features: Tensor, output: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The features of each text, and the place of the one token that the loss reads."""
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), output, retain_graph=True)
    read = slope.square().sum(-1).argmax(1)
    return (features if features.dim() == 2 else features[torch.arange(len(read)), read]), read


def _slopes(features: Tensor, output: Tensor, read: Tensor) -> Tensor:
    """Derivatives of each feature in what the MLP puts out at the token that is read."""
    rows = torch.arange(len(read))
    totals = features.sum(0)  # texts do not see each other: one backward pass serves all
    ones = torch.eye(len(totals), dtype=totals.dtype, device=totals.device)
    each = (torch.autograd.grad(totals, output, one, retain_graph=True)[0][rows, read] for one in ones)
    return torch.stack(list(each), 1)
