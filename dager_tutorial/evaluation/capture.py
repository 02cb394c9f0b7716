"""What a client sends in a round, of one step or of many: the beginning of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, play_locally
from dager_tutorial.client.step import head_of, play
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update


class Captured(NamedTuple):
    """An update, and what stays with the parties.

    Attributes:
        update: What the client sends.
        truth: What it keeps.
        head: The head that the server handed out.
    """

    update: Update
    truth: Truth
    head: Head


def captured(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None,
    config: ClientConfig,
    training: LocalTraining | None = None,
) -> Captured:
    """Play the client.

    Args:
        model: The model both sides know.
        texts: The private batch.
        labels: Its classes; see `client.step.client_update`.
        config: What the client does in a step.
        training: How it trains for several steps, and sends what its weights moved; None for one gradient.

    Raises:
        DagerError: The batch cannot be used, or the model cannot do what is asked.
    """
    if training is None:
        update, truth = play(model, texts, labels, config=config)
    else:
        update, truth = play_locally(model, texts, labels, config=config, training=training)
    return Captured(update, truth, head_of(config, truth.labels))
