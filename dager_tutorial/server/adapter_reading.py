"""From the gradients of a low-rank adapter to spans of what enters its maps (chapter `13_adapters`).

Of `y = W x + s B (A x)` with output gradient G the client sends `dB = s G^T (X A^T)` and `dA = s (G B)^T X`. Rows of
dA are combinations of the inputs, as those of any gradient, but only r for each map; maps that read the same inputs
are stacked. In a fresh adapter B is zero, and dA with it: what is left is dB, whose rows are combinations of the
*projected* inputs A x. The server knows A, so that it projects its candidates, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dager_tutorial.errors import UpdateError, quote
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import LowRankMaps, own_name, part_of
from dager_tutorial.models.tap import Tap, precise
from dager_tutorial.server.subspace import Span
from dager_tutorial.update import Update

Reader = Callable[..., Span | None]
"""What reads a span off a gradient (float64, outputs x inputs), as `span_of` does."""


def adapter_names(weight: str) -> tuple[str, str]:
    """The names of A and B beside that of the weight which they adapt.

    Example:
        >>> adapter_names("h.0.attn.c_attn.weight")
        ('h.0.attn.c_attn.lora_A.weight', 'h.0.attn.c_attn.lora_B.weight')
    """
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def adapter_gradients(update: Update, model: LanguageModel) -> dict[str, Tensor]:
    """The gradients of an adapter under the backbone's names; empty where the update is of the weights themselves.

    Args:
        update: What the client sent, named as peft's files or its models name parameters.
        model: The model both sides know, with its adapter.

    Raises:
        UpdateError: The update is of an adapter that the model has not.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in update.gradients.items():
        part = part_of(name)
        if part is None:
            continue
        if not model.adapter:
            raise UpdateError(
                f"the update is of a low-rank adapter ({quote(name)}): give the adapter that the server handed out, too"
            )
        found[_checked(name, part, tensor, model.adapter)] = tensor
    return found


def _checked(name: str, part: tuple[str, str], tensor: Tensor, maps: LowRankMaps) -> str:
    """The backbone's name of an adapter's parameter, after a look at its shape."""
    own = own_name(part[0], maps)
    if own is None:
        raise UpdateError(f"tensor {quote(name)} is of no map of the server's adapter: give the one that it handed out")
    names = adapter_names(f"{own}.weight")
    known = maps[own].down if part[1] == "A" else maps[own].up
    if tensor.shape != known.shape:
        raise UpdateError(
            f"tensor {quote(name)} has shape {quote(tuple(tensor.shape))[1:-1]}, the server's adapter "
            f"{tuple(known.shape)}: give the one it handed out"
        )
    return names[0] if part[1] == "A" else names[1]


def low_rank_span(tap: Tap, gradients: Mapping[str, Tensor], maps: LowRankMaps, read: Reader) -> Span | None:
    """The best span that an adapter's gradients give of a tap.

    Args:
        tap: The tap.
        gradients: Gradients by the backbone's names.
        maps: The adapter that the server handed out.
        read: Reads a span off a gradient.

    Returns:
        The inputs' own span, from A's gradients of all maps of the tap, or that of the inputs projected by one map's
        A, from the gradient of its B: the one that holds most rows (the keys and values of a causal model have first
        tokens, whose queries have no gradient), and of equals the one with most room. None where nothing was shared, or
        all is zero.
    """
    spans = [*_of_downs(tap, gradients, maps, read), *_of_ups(tap, gradients, maps, read)]
    return max(spans, key=lambda span: (span.rank, not span.saturated, span.free), default=None)


def _of_downs(tap: Tap, gradients: Mapping[str, Tensor], maps: LowRankMaps, read: Reader) -> list[Span]:
    """The span of A's gradients."""
    gradient = stacked_downs(tap, gradients, maps)
    span = None if gradient is None else read(gradient, uneven=len(tap.parameters) > 1)
    return [] if span is None else [span]


def stacked_downs(tap: Tap, gradients: Mapping[str, Tensor], maps: LowRankMaps) -> Tensor | None:
    """A's gradients of all maps of a tap, stacked: combinations of its inputs (float64, outputs x inputs).

    Args:
        tap: The tap.
        gradients: Gradients by the backbone's names.
        maps: The adapter that the server handed out.

    Returns:
        None where nothing was shared, or a fused map holds more outputs than the tap's.
    """
    shared = [
        _packed(precise(gradients[name]), precise(maps[weight.removesuffix(".weight")].up))
        for weight in tap.parameters
        if (name := adapter_names(weight)[0]) in gradients
    ]
    return torch.cat(shared) if shared and tap.outputs is None else None


def _packed(gradient: Tensor, up: Tensor) -> Tensor:
    """A's gradient (r x inputs), of a map with fewer outputs than r in as many rows, so that they tell what fits in."""
    return torch.linalg.qr(up.T).Q.T @ gradient if len(up) < up.shape[1] else gradient


def _of_ups(tap: Tap, gradients: Mapping[str, Tensor], maps: LowRankMaps, read: Reader) -> list[Span]:
    """The spans of projected inputs, map by map."""
    found = []
    for weight in tap.parameters:
        name = adapter_names(weight)[1]
        span = read(precise(gradients[name])[: tap.outputs]) if name in gradients else None
        if span is not None:
            found.append(replace(span, projection=precise(maps[weight.removesuffix(".weight")].down)))
    return found
