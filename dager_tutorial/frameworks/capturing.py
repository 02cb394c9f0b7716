"""What all frameworks have in common: named tensors become an `Update`, and an update a file of its own.

Chapter `12_federated`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.training import own_copy
from dager_tutorial.update import Update


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New weights minus old weights, at least float32, of all that came back.

    Args:
        after: The weights that came back, by name.
        before: The weights that were sent out.

    Raises:
        UpdateError: A tensor came back that was not sent out, or with another shape.

    Example:
        >>> difference({"w": torch.ones(2)}, {"w": torch.full((2,), 0.75)})
        {'w': tensor([0.2500, 0.2500])}
    """
    moved = {}
    for name, new in after.items():
        if name not in before or before[name].shape != new.shape:
            raise UpdateError(f"tensor {quote(name)} came back and was not sent out so: capture one model's round")
        wide = torch.promote_types(new.dtype, torch.float32)
        moved[name] = new.detach().to(wide) - before[name].detach().to(new.device, wide)
    return moved


def gradients_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Copies of the gradients that stand in `.grad`, on the CPU, by name.

    Args:
        parameters: What `named_parameters()` gives.

    Raises:
        UpdateError: No parameter has a gradient.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer(torch.ones(1)).backward()
        >>> gradients_of(layer.named_parameters())
        {'weight': tensor([[1.]]), 'bias': tensor([1.])}
    """
    found = {name: each.grad.detach().cpu().clone() for name, each in parameters if each.grad is not None}
    if not found:
        raise UpdateError("no parameter has a gradient: capture after backward() and before zero_grad()")
    return found


def with_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> LanguageModel:
    """The model at other weights: an update is read at the weights that its client was sent.

    Args:
        model: The model; it stays as it is.
        weights: By the names of the client's network, whatever its head. What is missing is as in the model.

    Raises:
        UpdateError: The weights are of another model.
        DagerError: The model has an adapter, whose weights are not the network's.
    """
    if model.adapter:
        raise DagerError("weights that travel replace a whole model's, and this one has an adapter: merge it first")
    network = own_copy(model.network, model.network.dtype)
    places = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in Update(dict(weights)).for_backbone(network).items():
            places[name].copy_(value)
    return LanguageModel(model.name, network, model.tokenizer)


def save_beside(update: Update, folder: str | os.PathLike[str], stem: str) -> Path:
    """Write an update into a folder under a name that nothing there has yet.

    Args:
        update: The update.
        folder: Where to; it is made if it is not there.
        stem: The file's name without suffix; where it is taken, `-2`, `-3` and so on come behind it.

    Returns:
        The file.

    Raises:
        DagerError: It cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder, update = mkdtemp(), Update({"w": torch.ones(1)})
        >>> [save_beside(update, folder, "step-1").name for _ in range(2)]
        ['step-1.safetensors', 'step-1-2.safetensors']
    """
    place = _made(folder)
    names = (f"{stem}.safetensors" if number == 1 else f"{stem}-{number}.safetensors" for number in count(1))
    path = next(place / name for name in names if not (place / name).exists())
    update.save(path)
    return path


def _made(folder: str | os.PathLike[str]) -> Path:
    """A folder, made where it is not there."""
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DagerError(f"{quote(folder)} cannot be made ({error.strerror}): name a folder to write to") from error
    return place
