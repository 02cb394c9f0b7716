"""The options of a client that trains for several steps, as in FedAvg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.client.federated import LocalTraining


@dataclass(frozen=True)
class TrainingOptions:
    """How a client of FedAvg trains before it sends what its weights moved."""

    epochs: Annotated[
        int | None, Option("--epochs", min=1, help="FedAvg: epochs of local training; left out, one gradient is sent.")
    ] = None
    mini_batch: Annotated[int, Option("--mini-batch", min=1, help="FedAvg: texts of one step.")] = 4
    local_lr: Annotated[float, Option("--local-lr", min=0.0, help="FedAvg: learning rate.")] = 1e-4
    optimizer: Annotated[
        Literal["sgd", "momentum", "adamw"], Option("--optimizer", help="FedAvg: the client's optimiser.")
    ] = "sgd"
    freeze_embeddings: Annotated[
        bool, Option("--freeze-embeddings", help="FedAvg: embeddings are not trained, and not sent.")
    ] = False

    def local(self) -> LocalTraining | None:
        """The client's local training; None where it sends one gradient.

        Raises:
            DagerError: Something of local training is asked for, but no epochs.
        """
        if self.epochs is None:
            if self != TrainingOptions():
                raise DagerError("options of local training do nothing without --epochs: give how many there are")
            return None
        from dager_tutorial.client.federated import LocalTraining

        return LocalTraining(
            self.epochs, self.mini_batch, self.local_lr, self.optimizer, frozen_embeddings=self.freeze_embeddings
        )
