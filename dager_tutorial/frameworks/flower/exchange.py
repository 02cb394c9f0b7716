"""From the arrays of a Flower message, and of its reply, to an update (chapter `12_federated`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from dager_tutorial.errors import UpdateError
from dager_tutorial.frameworks.capturing import difference
from dager_tutorial.update import KINDS, Update


@dataclass(frozen=True)
class Exchange:
    """What is agreed upon the arrays that travel.

    Attributes:
        kind: `delta` where clients send their new weights, `gradient` where they send gradients.
        names: The parameters' names as `named_parameters()` gives them. None: those that the arrays have, which of a
            `state_dict` are the parameters' own, buffers and tied weights besides. An app that sends a mere list of
            arrays needs the names, in its order.
        learning_rate: The clients' learning rate, where it is public.
        model: The model's name, for people to read.

    Raises:
        UpdateError: The kind is unknown.
    """

    kind: str = "delta"
    names: Sequence[str] | None = None
    learning_rate: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown kind before any training."""
        if self.kind not in KINDS:
            raise UpdateError(f"kind is {self.kind!r}: it must be 'gradient' or 'delta'")

    def update(self, sent: RecordDict, reply: RecordDict) -> Update:
        """The update that a client's reply is.

        Args:
            sent: The content of the message that the client got.
            reply: The content of its reply.

        Raises:
            UpdateError: The arrays do not belong together, or are no update.
        """
        tensors = self.tensors(reply)
        if self.kind == "delta":
            tensors = difference(tensors, self.tensors(sent))
        return Update(tensors, kind=self.kind, learning_rate=self.learning_rate, model=self.model)

    def tensors(self, content: RecordDict) -> dict[str, Tensor]:
        """The floating-point arrays of a message by parameter name.

        Args:
            content: Of one array record.

        Raises:
            UpdateError: There is not exactly one, or a mere list is of another length than the names.
        """
        records = list(content.array_records.values())
        if len(records) != 1:
            raise UpdateError(f"the message has {len(records)} array records: one is read")
        named = _named(records[0], self.names)
        return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}


def _named(record: ArrayRecord, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The arrays of a record by the names that are asked for."""
    given = record.to_torch_state_dict()
    if names is None:
        return dict(given)
    if any(name in given for name in names):
        return {name: given[name] for name in names if name in given}
    if len(names) != len(given):
        raise UpdateError(f"the message has {len(given)} arrays without names and {len(names)} are named: name all")
    return dict(zip(names, given.values(), strict=True))
