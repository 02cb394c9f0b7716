"""A client mod that attacks the update before it is uploaded, and may refuse to send it (chapter `12_federated`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from logging import INFO, WARNING

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from flwr.supercore import log

from dager_tutorial.errors import DagerError
from dager_tutorial.frameworks.capturing import with_weights
from dager_tutorial.frameworks.flower.exchange import Exchange
from dager_tutorial.frameworks.policy import MINUTE, Policy
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig


class Auditing:
    """A mod for `ClientApp(mods=[...])` or `@app.train(mods=[...])`: the server's own attack, run before the upload.

    It sees what the functions and mods behind it return. So it stands first, and what clips or adds noise behind it:
    `mods=[Auditing(model), LocalDpMod(...)]`. An update that the policy objects to, or that cannot be audited, is not
    sent; the reply is an error with the reason, in counts and never in texts, which strategies count as a failure.

    Args:
        model: The model that is trained; it is read at the weights that the server sent.
        policy: What an update may give away.
        limits: What the audit may cost; a minute by default.
        kind: See `exchange.Exchange`.
        names: See `exchange.Exchange`.
        report: Called with what the audit found. It stays on the client.

    Chapter `12_federated`.
    """

    def __init__(
        self,
        model: LanguageModel,
        policy: Policy | None = None,
        *,
        limits: AttackConfig = MINUTE,
        kind: str = "delta",
        names: Sequence[str] | None = None,
        report: Callable[[Reconstruction], None] | None = None,
    ) -> None:
        self.model, self.policy, self.limits, self.report = model, policy or Policy(), limits, report
        self.exchange = Exchange(kind, names, model=model.name)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Let the client train, attack what it is about to send, and send it or an error.

        Args:
            message: What the server sent.
            context: The client's.
            call_next: The next mod, or the app.
        """
        # The app may put other records into the content that it got; the records themselves do not change.
        sent = RecordDict(dict(message.content.items()))
        reply = call_next(message, context)
        if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN or reply.has_error():
            return reply
        try:
            objection = self._objection(sent, reply.content)
        except DagerError as error:
            objection = f"the audit failed ({error})"
        if objection is None:
            return reply
        log(WARNING, "client %d sends nothing: %s", context.node_id, objection)
        return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"not sent: {objection}"), reply_to=message)

    def _objection(self, sent: RecordDict, reply: RecordDict) -> str | None:
        """Why the reply may not be sent; None where it may."""
        update = self.exchange.update(sent, reply)
        weights = self.exchange.tensors(sent)
        found = attack(with_weights(self.model, weights), update, config=self.limits)
        log(INFO, "the client's audit: %s, %s", found.status, found.diagnosis)
        if self.report is not None:
            self.report(found)
        return self.policy.objection(found, _examples(reply))


def _examples(reply: RecordDict) -> int | None:
    """How many examples the client says that it trained on, by the key that Flower's strategies weigh with."""
    counts = (metrics.get("num-examples") for metrics in reply.metric_records.values())
    return next((int(count) for count in counts if isinstance(count, int | float)), None)
