"""Every defence against two attackers on the same update: one with fixed thresholds, and the one that adapts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defended import Defended, Protection, play_defended
from dager_tutorial.client.defenses.chain import Defence, protected
from dager_tutorial.client.defenses.clipping import Clipping
from dager_tutorial.client.defenses.noise import Noise
from dager_tutorial.client.defenses.pruning import PercentileFilter, Pruning
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.client.private import Privacy
from dager_tutorial.client.step import head_of
from dager_tutorial.errors import DagerError, UpdateError
from dager_tutorial.evaluation.accuracy import Batch
from dager_tutorial.evaluation.changes import selections
from dager_tutorial.evaluation.ladder import UNREADABLE
from dager_tutorial.evaluation.leakage import Leakage, leakage
from dager_tutorial.evaluation.sweep.attacker import Attacker, Received
from dager_tutorial.evaluation.sweep.attackers import ATTACKERS
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import AttackConfig

NOTHING = "nothing"
UNPROTECTED = Protection()
PAPER_CUTOFF, TEXTS_OF_A_LENGTH = 20, 20_000
"""The textbook's: the paper's cut-off of the rank, and the most texts of one length that are tested of an encoder."""


@dataclass(frozen=True)
class Cell:
    """A defence at a strength.

    Attributes:
        protection: What the client does.
        sends: Which of its gradients it sends, a name of `changes.selections`; empty for all.
    """

    protection: Protection = UNPROTECTED
    sends: str = ""

    @property
    def name(self) -> str:
        """What is done, in short."""
        return ", ".join(filter(None, [self.protection.told, self.sends])) or NOTHING


def usual_cells() -> tuple[Cell, ...]:
    """Every defence at the strengths that are published or are a platform's default."""
    chains: tuple[Defence, ...] = (
        *(Clipping(1.0, scope) for scope in ("update", "tensor")),
        *(Noise(deviation) for deviation in (1e-5, 5e-5, 1e-4, 5e-4, 1e-3)),  # the DAGER paper's, and one more
        *(Pruning(keep) for keep in (50, 10, 1)),
        Pruning(10, "random"),
        Pruning(10, each="update"),
        PercentileFilter(),
        *(Rounding(to) for to in ("bfloat16", "float16", "int8")),
        Rounding("int8", stochastic=True),
        Rounding("sign"),
    )
    withheld = ("without the embeddings", "attention alone", "without attention", "without block 0")
    return (
        Cell(),
        *(Cell(Protection(chain=(one,))) for one in chains),
        Cell(Protection(dropout=0.1)),
        *(Cell(Protection(privacy=Privacy(epsilon))) for epsilon in (50.0, 8.0, 1.0)),
        *(Cell(sends=name) for name in withheld),
    )


def leakage_row(
    model: LanguageModel,
    batch: Batch,
    cell: Cell,
    *,
    config: ClientConfig | None = None,
    limits: AttackConfig | None = None,
) -> dict[str, Any]:
    """What a defended update gives away to either attacker, and what it costs to send.

    Args:
        model: The model both sides know.
        batch: The texts.
        cell: The defence.
        config: What the client does in a step. The batch's seed is that of what the defences draw.
        limits: What an attack may cost.

    Returns:
        JSON types by name; `fixed_...` is the attacker of the paper's thresholds, `adaptive_...` the project's own.
        Seconds and bytes are those of one update.

    Raises:
        DagerError: The batch or the defence cannot be used.
    """
    config, limits = replace(config or ClientConfig(), seed=batch.seed), limits or AttackConfig()
    start = time.perf_counter()
    sent = _sent(model, batch, cell, config)
    row = {"tokens": sent.truth.n_tokens, "client_seconds": time.perf_counter() - start} | sent.to_json()
    options = {"rank_cutoff": PAPER_CUTOFF, "cap": TEXTS_OF_A_LENGTH, "time_budget": limits.time_budget}
    received = Received(model, sent.update, head_of(config, sent.truth.labels), sent.truth)
    for name, attacker, given in (("adaptive", "dager", limits), ("fixed", "textbook", options)):
        row |= _gone(received, ATTACKERS[attacker], given).to_json(f"{name}_")
    return row


def _gone(received: Received, attacker: Attacker, options: Any) -> Leakage:
    """What an attacker knows; nothing where it takes no such update."""
    try:
        return leakage(attacker.run(received, options).reconstruction, received.truth)
    except UpdateError:
        return Leakage(UNREADABLE, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)


def _sent(model: LanguageModel, batch: Batch, cell: Cell, config: ClientConfig) -> Defended:
    """The defended update, of which some is not sent."""
    sent = play_defended(model, batch.texts, batch.labels, config=config, protection=cell.protection)
    if not cell.sends:
        return sent
    choices = selections(model, sent.update)
    if cell.sends not in choices:
        raise DagerError(f"nothing of {model.name} can be sent {cell.sends!r}: choose one of {', '.join(choices)}")
    update, left = protected(sent.update, [choices[cell.sends]])
    return replace(sent, update=update, left=replace(left, norm=sent.left.norm))
