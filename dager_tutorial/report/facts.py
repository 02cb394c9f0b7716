"""Everything that an audit's report says, as plain values: the page and the JSON show the same record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dager_tutorial.client.batch import Truth
from dager_tutorial.evaluation.ladder import Rung
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.report.readings import Readings, readings_of
from dager_tutorial.report.sent import Sent, Source, sent_of
from dager_tutorial.report.sentences import Headline, headline
from dager_tutorial.report.texts import Compared, FoundText, compared, found_texts
from dager_tutorial.status import Status
from dager_tutorial.update import Update

SCHEMA = "dager-audit/1"


@dataclass(frozen=True)
class Given:
    """What the attack says of the batch.

    Attributes:
        status: The status, by its name.
        meaning: What the status means.
        advice: What to do about it.
        diagnosis: One sentence on this update.
        texts: The recovered texts.
        batch_size: How many texts the batch has, where that is certified.
        with_targets: Whether the texts hold what was only a target of the loss.
        unexplained: Share of the update that remains when the recovered texts are simulated and taken off it.
        seconds: Wall-clock seconds of the stages, and the total.
        peak_memory_mb: Peak memory of the process.
        numbers_read: How many of the update's numbers were read.
    """

    status: str
    meaning: str
    advice: str
    diagnosis: str
    texts: tuple[FoundText, ...]
    batch_size: int | None
    with_targets: bool
    unexplained: float | None
    seconds: dict[str, float]
    peak_memory_mb: float
    numbers_read: int

    @property
    def proven(self) -> int:
        """How many different texts are certain."""
        return sum(text.proven for text in self.texts)


@dataclass(frozen=True)
class About:
    """How the report was made.

    Attributes:
        command: The command, private texts left out where they are hidden.
        date: Day and time, UTC.
        versions: Name and version of the software.
        live: Whether the update was computed for the audit, from the owner's own texts.
    """

    command: str
    date: str
    versions: dict[str, str]
    live: bool


@dataclass(frozen=True)
class Facts:
    """An audit.

    Attributes:
        headline: The verdict in plain words.
        shows_texts: Whether texts stand in the report.
        sent: What was sent.
        readings: What can be read off it before any search.
        given: What the attack found.
        compared: The same beside the owner's texts, where they are known.
        ladder: What changes of the update do to the attack; empty where none was tried.
        about: How the report was made.
    """

    headline: Headline
    shows_texts: bool
    sent: Sent
    readings: Readings
    given: Given
    compared: Compared | None
    ladder: tuple[Rung, ...]
    about: About

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types only, its form named first."""
        return {"schema": SCHEMA, **_listed(asdict(self))}


def gather(
    model: LanguageModel,
    update: Update,
    found: Reconstruction,
    *,
    source: Source,
    about: About,
    truth: Truth | None = None,
    show_texts: bool = False,
) -> Facts:
    """Put together what is known of an update, the ladder aside.

    Args:
        model: The model both sides know.
        update: What the client sent.
        found: What the attack made of it.
        source: Where the update came from.
        about: How the report is made.
        truth: The owner's texts, where they are known.
        show_texts: Whether the record may hold any text, label or word of the batch.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: Nothing in the owner's texts could be recovered by anyone.
    """
    given, readings = given_of(model, found, show_texts=show_texts), readings_of(model, update, show_texts=show_texts)
    beside = None if truth is None else compared(found, truth, show_texts=show_texts)
    said = headline(found, readings.named.tokens)
    return Facts(said, show_texts, sent_of(model, update, source), readings, given, beside, (), about)


def given_of(model: LanguageModel, found: Reconstruction, *, show_texts: bool = False) -> Given:
    """What the attack says, as plain values.

    Args:
        model: The model both sides know.
        found: What the attack found.
        show_texts: Whether the record may hold texts and labels.
    """
    return Given(
        status=found.status.value,
        meaning=found.status.meaning,
        advice=found.status.advice,
        diagnosis=found.diagnosis,
        texts=found_texts(model, found, show_texts=show_texts),
        batch_size=found.batch_size if found.status is Status.CERTIFIED else None,
        with_targets=found.with_targets,
        unexplained=found.unexplained,
        seconds={stage: round(seconds, 2) for stage, seconds in found.seconds.items()},
        peak_memory_mb=round(found.peak_rss_mb),
        numbers_read=found.n_parameters_used,
    )


def with_ladder(facts: Facts, rungs: tuple[Rung, ...]) -> Facts:
    """The record with what changes of the update do to the attack.

    Args:
        facts: The record without.
        rungs: What was tried.
    """
    return replace(facts, ladder=rungs)


def _listed(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value
