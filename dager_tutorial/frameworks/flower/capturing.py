"""A strategy around any other, which keeps each client's update as a file (chapter `12_federated`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from dager_tutorial.errors import DagerError
from dager_tutorial.frameworks.capturing import save_beside, with_weights
from dager_tutorial.frameworks.flower.exchange import Exchange
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.zoo.checkpoint import save_checkpoint


class Capturing(Strategy):
    """Any strategy of Flower, and beside it a file of what each client sent, as an honest but curious server keeps it.

    Of each round, `folder` gets `round-001-client-<node id>.safetensors` for every client that replied, and, where the
    model is given, `round-001-model`, the model at the weights that were sent out, so that

        dager recover round-001-client-1.safetensors --model round-001-model

    reads any round. No older file is overwritten. A reply that is no update is logged and left out; training goes on.

    Args:
        strategy: What trains, as if nobody listened.
        folder: Where the files go; it is made if it is not there.
        model: The model that is trained. Left out, the weights that were sent out are not kept.
        kind: See `exchange.Exchange`.
        names: See `exchange.Exchange`.
        learning_rate: See `exchange.Exchange`.

    Chapter `12_federated`.
    """

    def __init__(
        self,
        strategy: Strategy,
        folder: str | os.PathLike[str],
        model: LanguageModel | None = None,
        *,
        kind: str = "delta",
        names: Sequence[str] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        self.strategy, self.folder, self.model = strategy, Path(folder), model
        self.exchange = Exchange(kind, names, learning_rate, model.name if model is not None else None)
        self._sent: dict[int, RecordDict] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy choose the clients, and keep what each is sent.

        Args:
            server_round: The round, from 1.
            arrays: The global model.
            config: What clients are told.
            grid: Where they are.
        """
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        # Flower hands `aggregate_train` the replies alone: an update needs what they reply to, too.
        self._sent = {message.metadata.dst_node_id: message.content for message in messages}
        if messages and self.model is not None:
            self._keep_weights(server_round, messages[0].content, self.model)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep each client's update, then let the strategy aggregate.

        Args:
            server_round: The round, from 1.
            replies: What came back; errors are the strategy's to count.
        """
        received = list(replies)
        for reply in received:
            if reply.has_content():
                self._keep_update(server_round, reply.metadata.src_node_id, reply.content)
        return self.strategy.aggregate_train(server_round, received)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy does it.

        Args:
            server_round: The round, from 1.
            arrays: The global model.
            config: What clients are told.
            grid: Where they are.
        """
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy does it.

        Args:
            server_round: The round, from 1.
            replies: What came back.
        """
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log what the strategy logs of itself, and where the files go."""
        log(INFO, "\t├──> Updates are captured in '%s'", self.folder)
        self.strategy.summary()

    def _keep_update(self, server_round: int, client: int, content: RecordDict) -> None:
        """Write one client's update; what a stranger sent must not stop the round."""
        try:
            update = self.exchange.update(self._sent[client], content)
            path = save_beside(update, self.folder, f"round-{server_round:03d}-client-{client}")
        except (DagerError, KeyError, ValueError, TypeError) as error:
            log(WARNING, "round %d: client %d's reply was not captured: %s", server_round, client, error)
        else:
            log(INFO, "round %d: client %d's update is %s", server_round, client, path.name)

    def _keep_weights(self, server_round: int, content: RecordDict, model: LanguageModel) -> None:
        """Write the model as this round's clients got it."""
        folder = self.folder / f"round-{server_round:03d}-model"
        if not folder.exists():
            sent = with_weights(model, self.exchange.tensors(content))
            folder.mkdir(parents=True)
            save_checkpoint(sent.network, sent.tokenizer, folder)
