"""A ladder of changes to one update, from gentle to hard, and what an attack still reads of each.

Every change is made on the update as an object, after training. The attack is the same one each time. It is not told of
the change, but sees noise, a grid or missing entries in the numbers; what stops it here need not stop another one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.defenses.clipping import size
from dager_tutorial.errors import UpdateError
from dager_tutorial.evaluation.changes import NOISE, UNCHANGED, Change
from dager_tutorial.evaluation.leakage import leakage
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel, frame_ids
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Progress
from dager_tutorial.status import Status
from dager_tutorial.update import Update

UNREADABLE = "unreadable"
"""The status of a change that leaves no update: numbers beyond the rounded type, or nothing the model knows."""


@dataclass(frozen=True)
class Rung:
    """What the attack made of a changed update.

    Attributes:
        kind: See `Change`.
        name: See `Change`.
        level: See `Change`.
        deviation: Standard deviation of the noise that a number got, over the length of the update; 0 for others.
        status: What the attack knows; `UNREADABLE` where nothing could be attacked.
        exact: Share of the texts that came back token by token.
        words: Mean ROUGE-1 of the texts: the share of their tokens that came back, in any order.
        confirmed: Share of the texts that came back and that the attack knows to be right.
        others: Texts that the attack calls confirmed and that are not among those it is compared with: false ones,
            where these are the owner's.
        seconds: Wall-clock seconds of the attack.
    """

    kind: str
    name: str
    level: float
    deviation: float
    status: str
    exact: float
    words: float
    confirmed: float
    others: int
    seconds: float

    @property
    def late(self) -> bool:
        """Whether time was too short, so that more may come back than did."""
        return self.status == Status.OUT_OF_TIME.value


def climb(
    model: LanguageModel,
    update: Update,
    truth: Truth,
    *,
    changes: Sequence[Change],
    unchanged: Reconstruction | None = None,
    head: Head | None = None,
    config: AttackConfig | None = None,
    progress: Progress | None = None,
) -> Iterator[Rung]:
    """Make each change on the update, attack it, and compare what comes back.

    Args:
        model: The model both sides know.
        update: What the client sent.
        truth: What it is compared with: the owner's texts, or `taken_for_true`.
        changes: What to try.
        unchanged: What the attack made of the update as it was sent, where that is known already.
        head: See `server.attack.attack`.
        config: What one attack may cost.
        progress: Called with "changes", how many are tried and how many there are.

    Yields:
        One rung a change, in their order.
    """
    numbers = size(update.gradients)
    for done, change in enumerate(changes):
        if progress is not None:
            progress("changes", done, len(changes))
        deviation = change.level / math.sqrt(numbers) if change.kind == NOISE else 0.0
        if change.kind == UNCHANGED and unchanged is not None:
            yield _rung(change, unchanged, truth, deviation, unchanged.seconds.get("total", 0.0))
            continue
        start = time.perf_counter()
        try:
            found: Reconstruction | None = attack(model, change.make(update), head=head, config=config)
        except UpdateError:  # numbers that leave the range of the rounded type, or nothing that is left to read
            found = None
        yield _rung(change, found, truth, deviation, time.perf_counter() - start)


def taken_for_true(model: LanguageModel, found: Reconstruction) -> Truth | None:
    """What was recovered from an update, in place of a truth that nobody gave: what changes of it are compared with.

    Args:
        model: The model both sides know.
        found: What the attack found; of it what is confirmed, or all where nothing is.

    Returns:
        None where there is no text.
    """
    certain = found.confirmed or found.sequences
    frame = frame_ids(model.tokenizer)
    wholes = tuple(ids for ids in found.sequences if ids in set(certain) and not frame.issuperset(ids))
    if not wholes:
        return None
    seen = tuple(ids[:-1] for ids in wholes) if found.with_targets and frame.isdisjoint(wholes[0][-1:]) else wholes
    return Truth(
        texts=tuple(map(model.text_of, wholes)),
        labels=(0,) * len(wholes),
        sequences=seen,
        wholes=wholes,
        n_tokens=sum(map(len, wholes)),
        task="unknown",
        hidden_size=model.hidden_size,
        frame=frame,
    )


def _rung(change: Change, found: Reconstruction | None, truth: Truth, deviation: float, seconds: float) -> Rung:
    shared = (change.kind, change.name, change.level, deviation)
    if found is None:
        return Rung(*shared, UNREADABLE, 0.0, 0.0, 0.0, 0, seconds)
    gone = leakage(found, truth)
    return Rung(*shared, gone.status, gone.exact, gone.rouge1, gone.confirmed, gone.false, seconds)
