"""A client that defends itself: training with dropout or DP-SGD, then what is done to the gradients.

Chapter `11_limits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defenses.chain import Defence, Left, protected
from dager_tutorial.client.federated import LocalTraining, play_locally
from dager_tutorial.client.private import Privacy, accounted, play_privately
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update


@dataclass(frozen=True)
class Protection:
    """What a client does against an attack. Which gradients it sends is `ClientConfig.share`.

    Attributes:
        dropout: Probability of dropout in training.
        privacy: What DP-SGD shall promise; None for a plain step.
        chain: What is done to the gradients, first things first.

    Chapter `11_limits`.
    """

    dropout: float = 0.0
    privacy: Privacy | None = None
    chain: tuple[Defence, ...] = ()

    @property
    def told(self) -> str:
        """What is done, in short; empty where nothing is."""
        first = [f"dropout={self.dropout:g}"] if self.dropout else []
        second = [] if self.privacy is None else [self.privacy.told]
        return ", ".join([*first, *second, *(defence.told for defence in self.chain)])


@dataclass(frozen=True)
class Defended:
    """What a client that defends itself sends, and what it knows.

    Attributes:
        update: What the server receives.
        truth: What it must never see.
        left: What the defences left. Of DP-SGD the norm is that of the mean of the clipped gradients.
        promise: What the accountant says of DP-SGD; empty without.
    """

    update: Update
    truth: Truth
    left: Left
    promise: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What there is to say of the defences, as JSON types."""
        return {"defences": self.update.defences} | self.left.to_json() | self.promise


def played(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig,
    training: LocalTraining | None,
) -> tuple[Update, Truth]:
    """Compute the update of a client as it is before any defence of its gradients.

    Args:
        model: See `play_defended`.
        texts: See `play_defended`.
        labels: See `play_defended`.
        config: See `play_defended`.
        training: See `play_defended`.

    Returns:
        What it would send, and what it knows.

    Raises:
        DagerError: See `play_defended`.
    """
    if training is None:
        return play(model, texts, labels, config=config)
    return play_locally(model, texts, labels, config=config, training=training)


def play_defended(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
    training: LocalTraining | None = None,
    protection: Protection,
) -> Defended:
    """Compute the update of a client that defends itself.

    Args:
        model: The shared model.
        texts: The private batch.
        labels: See `step.client_update`.
        config: What the client does in a step; its seed is that of what the defences draw, too.
        training: How many steps it takes; None: it sends one gradient.
        protection: What it does against an attack.

    Raises:
        DagerError: See `step.client_update` and `federated.local_update`; DP-SGD is asked for with several steps.

    Chapter `11_limits`.
    """
    config = replace(config or ClientConfig(), dropout=protection.dropout)
    told = f"dropout={protection.dropout:g}" if protection.dropout else None
    if protection.privacy is None:
        update, truth = played(model, texts, labels, config=config, training=training)
        return _sent(replace(update, defences=told), truth, protection, config.seed)
    if training is not None:
        raise DagerError("DP-SGD is one step: leave out local training")
    accounting = accounted(protection.privacy)
    update, truth, norm = play_privately(model, texts, labels, config=config, accounting=accounting)
    said = ", ".join(filter(None, [told, accounting.told]))
    whole = _sent(replace(update, defences=said), truth, protection, config.seed)
    left = replace(whole.left, norm=norm, bounded=norm, deviation=accounting.deviation(len(texts)))
    return replace(whole, left=left, promise=accounting.to_json())


def _sent(update: Update, truth: Truth, protection: Protection, seed: int) -> Defended:
    sent, left = protected(update, protection.chain, seed)
    return Defended(sent, truth, left, {})
