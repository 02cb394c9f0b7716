"""A Flower run in this process: a real ServerApp and real ClientApps, without Ray, a network or anything on disk.

Chapter `12_federated`. Flower's own simulation needs Ray. Here clients reply one after the other, so that a run is
reproducible and a debugger can step from the server into a client.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from typing import NamedTuple

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN, _SERVER = 1, 0


class Failure(NamedTuple):
    """A reply that was an error.

    Attributes:
        client: Its node id, from 1.
        reason: What it said.
    """

    client: int
    reason: str


def run_in_process(
    server: ServerApp,
    client: ClientApp,
    *,
    clients: int,
    config: UserConfig | None = None,
    quiet: bool = True,
) -> list[Failure]:
    """Run a server and its clients in this process, as `flwr run` would on many machines.

    Client number i has the node id i + 1, and in its `context.node_config` the `partition-id` i and `num-partitions`,
    as in Flower's simulation. A client that raises an exception replies with an error, as a SuperNode does.

    Args:
        server: The server's app.
        client: The app of every client.
        clients: How many there are.
        config: The run's configuration, `context.run_config` on both sides.
        quiet: Whether Flower logs errors alone.

    Returns:
        The replies that were errors, in their order.

    Example:
        >>> from flwr.app import MetricRecord
        >>> server, client = ServerApp(), ClientApp()
        >>> @client.query()
        ... def whoami(message, context):
        ...     return Message(RecordDict({"me": MetricRecord(dict(context.node_config))}), reply_to=message)
        >>> @server.main()
        ... def main(grid, context):
        ...     asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        ...     for reply in grid.send_and_receive(asked):
        ...         print(reply.metadata.src_node_id, dict(reply.content["me"]))
        >>> run_in_process(server, client, clients=2)
        1 {'partition-id': 0, 'num-partitions': 2}
        2 {'partition-id': 1, 'num-partitions': 2}
        []

    Chapter `12_federated`.
    """
    contexts = {
        number + 1: _context(number + 1, {"partition-id": number, "num-partitions": clients}, config)
        for number in range(clients)
    }
    grid = _OneProcess(client, contexts)
    with _identity(), _logging(quiet):
        server(grid, _context(_SERVER, {}, config))
    return grid.failures


def _context(node: int, node_config: UserConfig, config: UserConfig | None) -> Context:
    return Context(_RUN, node, node_config, RecordDict(), dict(config or {}))


@contextmanager
def _identity() -> Iterator[None]:
    """Who writes messages: Flower asks the process, which elsewhere is the server's or one client's alone."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, _RUN, _SERVER
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@contextmanager
def _logging(quiet: bool) -> Iterator[None]:
    """Flower's log as it is, or its errors alone."""
    logger = logging.getLogger("flwr")
    before = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _OneProcess(Grid):
    """Where the server finds its clients: a message is answered the moment it is sent."""

    def __init__(self, app: ClientApp, contexts: dict[int, Context]) -> None:
        self.app, self.contexts = app, contexts
        self.failures: list[Failure] = []
        self._replies: dict[str, Message] = {}
        self._numbers = count(1)
        self._run = Run.create_empty(_RUN)

    def set_run(self, run: Run) -> None:
        """Take over what is known of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """What is known of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, the way it was done before messages had a constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All clients are there at once."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have every message answered, in the order of the clients."""
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        return [self._answered(message) for message in ordered]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over the replies to some messages, once."""
        return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Have every message answered; no client is late."""
        return self.pull_messages(self.push_messages(messages))

    def _answered(self, message: Message) -> str:
        """Number a message, have its client answer it and keep the reply."""
        number = str(next(self._numbers))
        message.metadata.__dict__["_message_id"] = number  # as Flower's own grids number a message
        reply = self._reply_to(message)
        if reply.has_error():
            self.failures.append(Failure(message.metadata.dst_node_id, reply.error.reason or ""))
        self._replies[number] = reply
        return number

    def _reply_to(self, message: Message) -> Message:
        """What a client answers to its own copy of a message, whose arrays are bytes that nobody can change."""
        received = Message(deepcopy(message.content), metadata=message.metadata)
        try:
            return self.app(received, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # whatever the app of a client raises ends its reply, not the run
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
