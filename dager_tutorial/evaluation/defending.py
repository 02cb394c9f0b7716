"""Every defence against two attackers on the same update: one with fixed thresholds, and the one that adapts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
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
from dager_tutorial.evaluation.leakage import Leakage, leakage
from dager_tutorial.evaluation.store import is_there
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Progress
from dager_tutorial.status import Status
from dager_tutorial.textbook.choices import EncoderSearchOptions
from dager_tutorial.textbook.decoder import textbook_attack
from dager_tutorial.textbook.encoder import textbook_encoder_attack
from dager_tutorial.update import Update

NOTHING = "nothing"
UNPROTECTED = Protection()
UNREADABLE = "unreadable"
"""The status where no update is left, or none that an attacker takes."""


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a defended update gives away to either attacker, and what it costs to send.

    Args:
        model: The model both sides know.
        batch: The texts.
        cell: The defence.
        config: What the client does in a step. The batch's seed is that of what the defences draw.
        limits: What an attack may cost.
        progress: Called with a stage, what is done and the total or None.

    Returns:
        JSON types by name; `fixed_...` is the attacker of the paper's thresholds, `adaptive_...` the project's own, who
        is told the probability of dropout where it takes it. Seconds and bytes are those of one update.

    Raises:
        DagerError: The batch or the defence cannot be used.
    """
    config = replace(config or ClientConfig(), seed=batch.seed)
    start = time.perf_counter()
    sent = _sent(model, batch, cell, config)
    row = {"tokens": sent.truth.n_tokens, "client_seconds": time.perf_counter() - start} | sent.to_json()
    limits = told(limits or AttackConfig(), cell.protection)
    head = head_of(config, sent.truth.labels)
    found = _attempt(lambda: attack(model, sent.update, head=head, config=limits, progress=progress))
    fixed = _attempt(lambda: fixed_attack(model, sent.update, limits.time_budget, progress))
    for name, result in (("adaptive", found), ("fixed", fixed)):
        row |= _gone(result, sent).to_json(f"{name}_")
    return row


def told(limits: AttackConfig, protection: Protection) -> AttackConfig:
    """What an attacker is told of a defence: the strength that the server itself asks for.

    Args:
        limits: What an attack may cost.
        protection: What the client does.
    """
    known = {field.name for field in fields(limits)}
    strength: dict[str, Any] = {"dropout": protection.dropout}
    return replace(limits, **{name: value for name, value in strength.items() if name in known})


def fixed_attack(
    model: LanguageModel, update: Update, seconds: float | None = None, progress: Progress | None = None
) -> Reconstruction | None:
    """The paper's attack with its fixed thresholds, as the textbook writes it.

    Args:
        model: The model both sides know.
        update: What the client sent.
        seconds: Time after which the search is given up; None for no limit.
        progress: See `leakage_row`.

    Returns:
        None where its time ran out.
    """
    if not adapter_for(model.network).causal:
        options = EncoderSearchOptions(cap=20_000, time_budget=seconds)
        return textbook_encoder_attack(model, update, options=options, progress=progress)
    start = time.perf_counter()

    def watch(stage: str, done: int, total: int | None) -> None:
        if seconds is not None and time.perf_counter() - start > seconds:
            raise TimeoutError
        if progress is not None:
            progress(stage, done, total)

    try:
        return textbook_attack(model, update, progress=watch)
    except TimeoutError:
        return None


def missing(
    batches: Sequence[Batch], cells: Sequence[Cell], rows: Sequence[dict[str, Any]], shared: dict[str, Any]
) -> Iterator[tuple[Batch, Cell, dict[str, Any]]]:
    """What is not measured yet.

    Args:
        batches: The texts.
        cells: The defences.
        rows: What was measured before.
        shared: Parameters that all runs share.

    Yields:
        Batch, cell, and all parameters that name their row.
    """
    for cell in cells:
        for batch in batches:
            own = {"data": batch.data, "batch_size": len(batch.texts), "seed": batch.seed, "defence": cell.name}
            if not is_there(rows, shared | own):
                yield batch, cell, shared | own


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


def _attempt(run: Callable[[], Reconstruction | None]) -> Reconstruction | str | None:
    """What an attack found; the status to report where it takes no such update."""
    try:
        return run()
    except UpdateError:
        return UNREADABLE


def _gone(found: Reconstruction | str | None, sent: Defended) -> Leakage:
    if isinstance(found, Reconstruction):
        return leakage(found, sent.truth)
    return Leakage(found or Status.OUT_OF_TIME.value, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
