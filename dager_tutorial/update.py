"""The update: what a federated-learning client sends, and all that the server sees of a batch.

Chapters `01_gradients_leak` and `10_whole_attack`.

An update is a set of named gradients (or weight deltas) and a little public information about them. On disk
it is a plain safetensors file, so that reading one from a stranger executes nothing.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.files import check_safetensors, replacing

KINDS = ("gradient", "delta")
"""What an update's tensors can be: gradients of the loss, or new weights minus old weights."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Update:
    """Named gradients that a client shared, validated when the record is made.

    Attributes:
        gradients: Parameter name to tensor of that parameter's shape, float16, bfloat16, float32 or float64.
            The names are those of ``named_parameters()`` of the client's model, whatever its head. A
            parameter that is missing was not shared.
        kind: ``"gradient"``, or ``"delta"`` for new weights minus old weights.
        learning_rate: The client's learning rate, where it is public.
        model: Name of the model, for people to read.
        defences: What the server is told of the client's defences and their strength, for people to read.

    Raises:
        UpdateError: There is no tensor, one is not of a floating type, empty, or holds a non-finite value;
            the kind is unknown; the learning rate is not a positive finite number.

    Example:
        >>> update = Update({"h.0.attn.c_attn.weight": torch.ones(4, 12)})
        >>> update.kind, update.learning_rate
        ('gradient', None)
        >>> Update({"w": torch.tensor([float("nan")])})
        Traceback (most recent call last):
        dager_tutorial.errors.UpdateError: tensor 'w' holds NaN or infinity: capture the update again
    """

    gradients: dict[str, torch.Tensor]
    kind: str = "gradient"
    learning_rate: float | None = None
    model: str | None = None
    defences: str | None = None

    def __post_init__(self) -> None:
        """Check every field, so that no later stage has to."""
        _check_public(self.kind, self.learning_rate, {"model": self.model, "defences": self.defences})
        if not self.gradients:
            raise UpdateError("the update has no tensors: share at least one parameter's gradient")
        for name, tensor in self.gradients.items():
            _check_tensor(name, tensor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the update as a safetensors file.

        An older file of that name is replaced only when all is written.

        Args:
            path: The file to write. Its folder must exist.

        Raises:
            UpdateError: The file cannot be written there: it is a folder or a device, the disk is full, ...
        """
        try:
            with replacing(Path(path)) as partial:
                save_file(_unshared(self.gradients), partial, metadata=self._metadata())
        except DagerError as error:
            raise UpdateError(str(error)) from error
        except (OSError, SafetensorError) as error:
            raise UpdateError(
                f"{quote(path)} cannot be written ({quote(error)}): name a file in an existing folder with room for it"
            ) from error

    def _metadata(self) -> dict[str, str]:
        """The public fields as the strings that a safetensors header holds."""
        fields = {key: value for key, value in vars(self).items() if key != "gradients"}
        return {key: str(value) for key, value in fields.items() if value is not None}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Update:
        """Read an update file. Nothing in it is executed, and no tensor can be larger than the file.

        Args:
            path: A safetensors file of named gradients. The metadata strings ``kind``, ``learning_rate``,
                ``model`` and ``defences`` are optional; others are ignored.

        Returns:
            The update, its tensors on the CPU in the file's dtypes. They are mapped into memory, not copied,
            so the file may be replaced (as `save` does) but not overwritten in place while they are in use.

        Raises:
            UpdateError: The file is missing, a folder, unreadable, empty, truncated or no safetensors file,
                or its content is not a valid update. One line, which names the file.
        """
        path = Path(path)
        try:
            check_safetensors(path)
            with safe_open(path, framework="pt") as file:
                fields = _public_fields(file.metadata() or {})
                return cls({name: _read_tensor(file, name) for name in file.keys()}, **fields)  # noqa: SIM118
        except UpdateError as error:
            raise UpdateError(f"{quote(path)}: {error}") from error
        except SafetensorError as error:
            raise UpdateError(f"{quote(path)}: {_explain(error)}") from error
        except (OSError, ValueError) as error:
            raise UpdateError(f"{quote(path)} cannot be read ({quote(error)}): check the path") from error

    def for_head(self, network: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The gradients that belong to no parameter of a headless model, under the update's own names.

        Args:
            network: The headless model.

        Raises:
            UpdateError: A name is like the backbone's and yet unknown.
        """
        inside = dict(network.named_parameters())
        return {n: tensor for n, tensor in self.gradients.items() if _backbone_name(n, network, inside) is None}

    def for_backbone(self, network: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The gradients that belong to a headless model, under the names that model uses.

        The client may have trained the backbone inside a larger model: a prefix such as ``transformer.``,
        ``model.`` or ``bert.`` is taken off, and gradients of a head (``score.weight``, ``classifier.*``,
        ``lm_head.weight``) are left out, since nothing is known of the head's inputs beyond the backbone.

        Args:
            network: The headless model.

        Returns:
            Name in ``network.named_parameters()`` to the tensor of that parameter's shape, in the network's
            order.

        Raises:
            UpdateError: No name belongs to the backbone, a name is like the backbone's and yet unknown, a
                name occurs with and without prefix, or a shape differs.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.gradients.items():
            own = _backbone_name(name, network, shapes)
            if own is None:
                continue
            _check_place(name, own, tensor, shapes, found)
            found[own] = tensor
        if not found:
            raise UpdateError(_wrong_model(self, network))
        return {name: found[name] for name in shapes if name in found}


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise unless this is a tensor of finite numbers in a dtype that a client can train in."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES.values():
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UpdateError(f"tensor {quote(name)} is {kind}: gradients are float16, bfloat16, float32 or float64")
    if tensor.numel() == 0:
        raise UpdateError(f"tensor {quote(name)} has no elements: leave out what is not shared")
    low, high = torch.aminmax(tensor.detach().reshape(-1))  # NaN propagates; no temporary as large as the tensor
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UpdateError(f"tensor {quote(name)} holds NaN or infinity: capture the update again")


def _check_public(kind: str, learning_rate: float | None, words: Mapping[str, str | None]) -> None:
    """Raise unless the public fields make sense."""
    if kind not in KINDS:
        raise UpdateError(f"kind is {quote(kind)}: it must be 'gradient' or 'delta'")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UpdateError(f"learning_rate is {quote(learning_rate)}: it must be a positive finite number")
    for field, value in words.items():
        if value is not None and not value.isprintable():
            raise UpdateError(f"{field} is {quote(value)}: a name may not have control characters")


def _public_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata strings of a file as arguments of `Update`."""
    fields: dict[str, Any] = {key: metadata[key] for key in ("kind", "model", "defences") if key in metadata}
    if "learning_rate" in metadata:
        try:
            fields["learning_rate"] = float(metadata["learning_rate"])
        except ValueError:
            text = quote(metadata["learning_rate"])
            raise UpdateError(f"learning_rate is {text}: it must be a positive finite number") from None
    return fields


def _explain(error: SafetensorError) -> str:
    """What a message of the safetensors parser means for the user."""
    text = str(error).removeprefix("Error while deserializing header: ")
    if "not fully covered" in text or "Incomplete" in text:
        return "the file is truncated, or longer than its header says: copy or capture the update again"
    return f"not a valid safetensors file ({quote(text)}): capture the update again"


def _read_tensor(file: Any, name: str) -> torch.Tensor:
    """One tensor of an open safetensors file; its dtype is checked before any byte of it is read."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
        raise UpdateError(f"tensor {quote(name)} is {dtype}: gradients are float16, bfloat16, float32 or float64")
    return file.get_tensor(name)


def _unshared(gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous, none a view of another's memory, as safetensors wants them."""
    result, owners = {}, set()
    for name, tensor in gradients.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in owners or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        owners.add(storage.data_ptr())
        result[name] = tensor
    return result


def _backbone_name(name: str, network: PreTrainedModel, shapes: Mapping[str, object]) -> str | None:
    """The backbone's own name of a parameter; None when it belongs to a head.

    Raises:
        UpdateError: The name points into the backbone at a parameter that is not there.
    """
    prefix = f"{network.base_model_prefix}."
    stripped = name.removeprefix(prefix)
    for own in (stripped, name):
        if own in shapes:
            return own
    children = {child for child, _ in network.named_children()}
    if stripped == name and name.split(".")[0] not in children:
        return None
    near = difflib.get_close_matches(stripped, list(shapes), n=1)
    hint = f" (nearest: {near[0]!r})" if near else ""
    raise UpdateError(
        f"tensor {quote(name)} is no parameter of the {_describe(network)}{hint}: name the model that the client used"
    )


def _check_place(
    name: str,
    own: str,
    tensor: torch.Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, torch.Tensor],
) -> None:
    """Raise unless the tensor has its parameter's shape and is the only one for it."""
    if own in found:
        raise UpdateError(f"tensor {quote(name)} is given twice, with and without its prefix: keep one")
    if tuple(tensor.shape) != shapes[own]:
        raise UpdateError(
            f"tensor {quote(name)} has shape {quote(tuple(tensor.shape))[1:-1]}, the model's parameter has "
            f"{shapes[own]}: name the model that the client used"
        )


def _describe(network: PreTrainedModel) -> str:
    """A backbone in three words, for messages."""
    return f"{network.config.model_type} model"


def _wrong_model(update: Update, network: PreTrainedModel) -> str:
    """The message for an update none of whose names is the backbone's."""
    first, expected = next(iter(update.gradients)), next(name for name, _ in network.named_parameters())
    origin = f", and the update names the model {quote(update.model)}" if update.model else ""
    return (
        f"no tensor of the update belongs to the {_describe(network)} (it has {quote(first)}, the model has "
        f"{expected!r}{origin}): name the model that the client used"
    )
