"""The options of a client that trains for several steps, as in FedAvg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.client.batch import Truth
    from dager_tutorial.client.config import ClientConfig
    from dager_tutorial.models.language_model import LanguageModel
    from dager_tutorial.update import Update


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

    def play(
        self, model: LanguageModel, texts: list[str], labels: list[int] | None, config: ClientConfig
    ) -> tuple[Update, Truth]:
        """The client's update and what it knows: of one step, or of so many epochs.

        Args:
            model: The model both sides know.
            texts: The private batch.
            labels: Its classes.
            config: What the client does in a step.

        Raises:
            DagerError: Something of local training is asked for, but no epochs.
        """
        from dager_tutorial.client.federated import LocalTraining, play_locally
        from dager_tutorial.client.step import play

        if self.epochs is None:
            if self != TrainingOptions():
                raise DagerError("options of local training do nothing without --epochs: give how many there are")
            return play(model, texts, labels, config=config)
        training = LocalTraining(
            self.epochs, self.mini_batch, self.local_lr, self.optimizer, frozen_embeddings=self.freeze_embeddings
        )
        return play_locally(model, texts, labels, config=config, training=training)
