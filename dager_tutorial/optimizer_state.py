"""An optimiser's state is a gradient: what a checkpoint's `optimizer.pt` gives away (chapter `12_federated`).

Adam keeps a running mean of the gradients, `m_t = beta m_(t-1) + (1 - beta) g_t`. After the first step it is the
gradient up to a factor; two checkpoints one step apart give `(m_t - beta m_(t-1)) / (1 - beta)`; one later checkpoint
alone gives a sum of the last gradients. Momentum of SGD is the same. What the step did to the *weights* tells far less:
Adam's first step keeps little but signs, which have full rank.

The file is read as tensors and plain numbers only: one that asks for any code to be run is refused.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.models.heads import Head, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import wire_name
from dager_tutorial.update import Update

FILE = "optimizer.pt"
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names that transformers' Trainer puts into the group without weight decay, beside all of its LayerNorms."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Moment:
    """The running mean of one parameter's gradients: `kept` of it stays with each step, `added` of a gradient comes."""

    mean: Tensor
    kept: float
    added: float
    step: int | None


def is_optimizer_state(path: str | os.PathLike[str]) -> bool:
    """Whether a path is taken for a checkpoint's optimiser state: a folder, or a file that torch.save names so.

    Args:
        path: What the user gave.
    """
    return Path(path).is_dir() or Path(path).suffix in (".pt", ".pth")


def update_of_state(
    model: LanguageModel, path: str | os.PathLike[str], before: str | os.PathLike[str] | None = None
) -> Update:
    """The gradient that an optimiser's state holds.

    Args:
        model: The model at the weights that the last gradient was computed with, those before the step.
        path: A checkpoint folder with `optimizer.pt`, or that file: of Adam, AdamW, or SGD with momentum.
        before: The same one step earlier. None: after the first step the state is the gradient; later it is a sum of
            the last gradients, the latest weighing most.

    Returns:
        The gradient under the names of the model's parameters, and of its head where that is of a known class.

    Raises:
        UpdateError: A file is missing, no state of such an optimiser, would run code, or is of another model.

    See chapter `12_federated`.
    """
    place = _located(path)
    state = _read(place)
    now = _moments(place, state)
    names = _names(place, state, model, [tuple(moment.mean.shape) for moment in now])
    if before is None:
        return Update({n: (each.mean.double() / each.added).float() for n, each in zip(names, now, strict=True) if n})
    earlier = _moments(_located(before), _read(_located(before)))
    _check_one_step(place, now, earlier)
    pairs = zip(names, now, earlier, strict=True)
    return Update({name: _difference(one, other) for name, one, other in pairs if name})


def _difference(now: _Moment, before: _Moment) -> Tensor:
    """The gradient of the last step alone, float32."""
    return ((now.mean.double() - now.kept * before.mean.double()) / now.added).float()


def _check_one_step(path: Path, now: list[_Moment], before: list[_Moment]) -> None:
    """Raise where two states are not one step of one training apart."""
    if [each.mean.shape for each in now] != [each.mean.shape for each in before]:
        raise UpdateError(
            f"{quote(path)} and the state before it are of different parameters: give two of one training"
        )
    steps = {None if a.step is None or b.step is None else a.step - b.step for a, b in zip(now, before, strict=True)}
    if steps - {None, 1}:
        raise UpdateError(
            f"{quote(path)} is {steps.pop()} steps after the state before it: give two that are one apart"
        )


def _located(path: str | os.PathLike[str]) -> Path:
    place = Path(path).expanduser()
    return place / FILE if place.is_dir() else place


def _read(path: Path) -> dict[str, Any]:
    """What torch.save wrote, as tensors and plain values; code is never run, whatever the file asks for."""
    if not path.is_file():
        raise UpdateError(f"{quote(path)}: no such file: give a checkpoint folder that holds {FILE}, or that file")
    if not zipfile.is_zipfile(path):
        raise UpdateError(f"{quote(path)} is not a file of torch.save's present format: save the state again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise UpdateError(f"{quote(path)} holds pickled code{what}: it was not run, and the file is not read") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UpdateError(f"{quote(path)} cannot be read ({quote(error)}): save the state again") from error
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict) or not state.get("param_groups"):
        raise UpdateError(f"{quote(path)} is no optimiser's state_dict (state, param_groups): give the right file")
    return state


def _moments(path: Path, state: Mapping[str, Any]) -> list[_Moment]:
    """The running means in the order in which the optimiser numbers its parameters."""
    try:
        return [
            _moment(path, group, state["state"][index]) for group in state["param_groups"] for index in group["params"]
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UpdateError(f"{quote(path)} is not the state of Adam, AdamW or SGD with momentum: no {error}") from None


def _moment(path: Path, group: Mapping[str, Any], own: Mapping[str, Any]) -> _Moment:
    """One parameter's."""
    if isinstance(own.get("exp_avg"), Tensor) and "exp_avg_sq" in own:
        if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
            raise UpdateError(f"{quote(path)} is of Adam with weight decay inside the gradient: only AdamW's is read")
        beta = float(group["betas"][0])
        return _Moment(own["exp_avg"], beta, 1 - beta, int(own["step"]))
    if not isinstance(own["momentum_buffer"], Tensor):
        raise KeyError("momentum_buffer")
    return _Moment(own["momentum_buffer"], float(group["momentum"]), 1 - float(group.get("dampening", 0)), None)


def _names(path: Path, state: Mapping[str, Any], model: LanguageModel, shapes: list[tuple[int, ...]]) -> list[str]:
    """The parameters' names in the optimiser's order; empty for those of a head that is not known."""
    given = [name for group in state["param_groups"] for name in group.get("param_names", ())]
    if len(given) == len(shapes):
        return given
    sizes = [len(group["params"]) for group in state["param_groups"]]
    for known in _trained(model, shapes):
        for groups in ([list(known)], _decayed(known, model.network)):
            named = _fitted(groups, known, shapes, sizes)
            if named is not None:
                return named
    raise UpdateError(
        f"the {len(shapes)} tensors of {quote(path)} do not have the shapes of this model's parameters in their order: "
        "name the model (and adapter) that was trained; where parameters were frozen, which ones is not told"
    )


def _fitted(
    groups: list[list[str]], known: Shapes, shapes: list[tuple[int, ...]], sizes: list[int]
) -> list[str] | None:
    """Names where they have the shapes, group by group, a group's last ones unknown; None where they do not fit."""
    filled = [group for group in groups if group]
    sizes = [size for size in sizes if size]
    if len(filled) != len(sizes) or any(len(group) > size for group, size in zip(filled, sizes, strict=True)):
        return None
    padded = [[*group, *[""] * (size - len(group))] for group, size in zip(filled, sizes, strict=True)]
    names = [name for group in padded for name in group]
    fits = all(not name or known[name] == shape for name, shape in zip(names, shapes, strict=True))
    return names if fits else None


def _trained(model: LanguageModel, shapes: list[tuple[int, ...]]) -> Iterator[Shapes]:
    """What may have been trained: the adapter, the model with a head of each kind, or with something else behind it."""
    if model.adapter:
        modules = [name for name, _ in model.network.named_modules() if name in model.adapter]
        parts = {f"{name}.lora_{part}": each for name in modules for part, each in _parts(model, name)}
        yield {wire_name(f"{name}.weight"): shape for name, shape in parts.items()}
        return
    classes = {shape[0] for shape in shapes if len(shape) == 2 and shape[1] == model.hidden_size and shape[0] > 1}
    heads = [Head("classification", min(classes, default=2)), Head("next_token"), Head("masked")]
    for head in heads:
        try:
            network = with_head(model.network, model.tokenizer, head)
        except DagerError:
            continue
        yield {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    yield {name: tuple(parameter.shape) for name, parameter in model.network.named_parameters()}


def _parts(model: LanguageModel, name: str) -> list[tuple[str, tuple[int, ...]]]:
    each = model.adapter[name]
    return [("A", tuple(each.down.shape)), ("B", tuple(each.up.shape))]


def _decayed(known: Shapes, network: nn.Module) -> list[list[str]]:
    """The two groups that transformers' Trainer makes: with weight decay, and without."""
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    bare = {
        name
        for name in known
        if _UNDECAYED.search(name.lower())
        or any(f".{name}".endswith((f".{norm}.weight", f".{norm}.bias")) for norm in norms)
    }
    return [[name for name in known if name not in bare], [name for name in known if name in bare]]
