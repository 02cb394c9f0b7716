"""What a client sent and what it did not, in numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dager_tutorial.client.defenses.clipping import length, size
from dager_tutorial.evaluation.parts import KINDS, Part, parts_of_network, parts_of_update
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import part_of
from dager_tutorial.optimizer_state import FILE
from dager_tutorial.update import Update


@dataclass(frozen=True)
class Source:
    """Where an update came from.

    Attributes:
        file: Name of its file, without folders; None where it was computed for the audit.
        size: Bytes of the file.
        sha256: The file's hash, which says what this report is of.
    """

    file: str | None = None
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class SentPart:
    """How much of one part of the network was sent.

    Attributes:
        kind: One of `parts.KINDS`.
        tensors: Tensors of it that were sent.
        numbers: Numbers in them.
        tensors_there: Tensors that the network has of it; None for a head, which the server's model has not, and for
            an adapter.
        blocks: How many blocks they are of.
    """

    kind: str
    tensors: int
    numbers: int
    tensors_there: int | None
    blocks: int


@dataclass(frozen=True)
class SentTensor:
    """One tensor: its name as the update spells it, its shape, its type, and the part that it belongs to."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


@dataclass(frozen=True)
class Network:
    """The model that both sides know: its name and the sizes that matter."""

    name: str
    architecture: str
    blocks: int
    width: int
    vocabulary: int
    parameters: int
    adapter_rank: int | None


@dataclass(frozen=True)
class Sent:
    """What was sent.

    Attributes:
        source: Where it came from.
        network: The model.
        named_model: The model's name, as the update says it; None where it does not.
        update_kind: `gradient` or `delta`.
        learning_rate: Where it is public.
        numbers: How many numbers there are.
        length: The update's Euclidean norm.
        dtypes: Tensors of each type.
        parts: How much of each part of the network.
        tensors: All of them.
    """

    source: Source
    network: Network
    named_model: str | None
    update_kind: str
    learning_rate: float | None
    numbers: int
    length: float
    dtypes: dict[str, int]
    parts: tuple[SentPart, ...]
    tensors: tuple[SentTensor, ...]


def source_of(path: Path) -> Source:
    """Name, size and hash of an update's file.

    Args:
        path: A file, or a checkpoint folder whose optimiser state is the update.
    """
    file = path / FILE if path.is_dir() else path
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Source(file.name, file.stat().st_size, digest)


def sent_of(model: LanguageModel, update: Update, source: Source) -> Sent:
    """Describe an update.

    Args:
        model: The model both sides know.
        update: What the client sent.
        source: Where it came from.

    Raises:
        UpdateError: The update does not belong to the model.
    """
    parts = parts_of_update(model, update)
    dtypes = Counter(_type(tensor.dtype) for tensor in update.gradients.values())
    return Sent(
        source,
        _network(model),
        update.model,
        update.kind,
        update.learning_rate,
        numbers=size(update.gradients),
        length=length(update.gradients),
        dtypes=dict(dtypes),
        parts=_parts(update, parts, _there(model, update)),
        tensors=tuple(
            SentTensor(name, tuple(tensor.shape), _type(tensor.dtype), parts[name].kind)
            for name, tensor in update.gradients.items()
        ),
    )


def _network(model: LanguageModel) -> Network:
    config = model.network.config
    ranks = [one.rank for one in model.adapter.values()]
    return Network(
        name=model.name,
        architecture=str(config.model_type),
        blocks=adapter_for(model.network).num_blocks,
        width=model.hidden_size,
        vocabulary=int(config.vocab_size),
        parameters=sum(each.numel() for each in model.network.parameters()),
        adapter_rank=max(ranks, default=None),
    )


def _there(model: LanguageModel, update: Update) -> Mapping[str, int]:
    """How many tensors each part has that could have been sent."""
    adapted = any(map(part_of, update.gradients))
    return {} if adapted else Counter(part.kind for part in parts_of_network(model).values())


def _parts(update: Update, parts: Mapping[str, Part], there: Mapping[str, int]) -> tuple[SentPart, ...]:
    """The parts that the network has, and the head, sent or not."""
    found = []
    for kind in KINDS:
        names = [name for name, part in parts.items() if part.kind == kind]
        blocks = {parts[name].block for name in names} - {None}
        numbers = sum(update.gradients[name].numel() for name in names)
        found.append(SentPart(kind, len(names), numbers, there.get(kind), len(blocks)))
    return tuple(found)


def _type(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
