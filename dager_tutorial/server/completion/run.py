"""Completion: the texts of a search weighed, taken off the update, the rest searched again, all of it proven.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.guess import plausible_heads
from dager_tutorial.server.completion.ledger import Ledger
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import FoundText, Outcome
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.update import Update

Search = Callable[[Evidence], Outcome]


def completed(
    model: LanguageModel,
    update: Update,
    head: Head | None,
    evidence: Evidence,
    search: Search,
    outcome: Outcome,
    budget: Budget,
) -> Outcome:
    """Complete what a search found.

    Args:
        model: The model both sides know.
        update: What the client sent.
        head: The head that the server handed out; None where it is to be guessed.
        evidence: What the update says.
        search: Searches an update.
        outcome: What it found in this one.
        budget: What it may cost.

    Returns:
        The same outcome where nothing could be completed.
    """
    if not outcome.texts or budget.late or update.kind != "gradient":
        return outcome
    with evidence.watch.stage("completion"):
        for each in [head] if head is not None else plausible_heads(update, evidence.adapter):
            if each.task != "classification":
                continue
            ledger = Ledger(Simulator(model, update, each, evidence.precision), evidence, update.gradients)
            better = peeled(evidence, ledger, outcome, search, budget)
            if better is not outcome:
                return better
    return outcome


def peeled(evidence: Evidence, ledger: Ledger, first: Outcome, search: Search, budget: Budget) -> Outcome:
    """Weigh the texts that a search found, take them off the update and search what remains, until all is explained.

    Args:
        evidence: What the update says.
        ledger: Its account, with no text entered yet.
        first: What the search made of the whole update.
        search: Searches an update.
        budget: What it may cost.

    Returns:
        The first outcome where no text could be weighed; else the texts of all rounds, with labels and counts, the
        share of the update that they leave unexplained, and the status that fits.
    """
    found = {text.tokens: text for text in first.texts}
    unexplained: float | None = None
    latest = first
    while ledger.enter([text.tokens for text in latest.texts]):
        rest = ledger.rest()
        share = ledger.share(rest)
        if share >= (1.0 if unexplained is None else unexplained):  # a text that is there takes something off
            ledger.undo()
            break
        unexplained = share
        if ledger.complete or unexplained <= constants().certified or budget.late:
            break
        budget.report("completion", len(ledger.texts), ledger.size)
        latest = search(evidence.less(_for_backbone(rest, evidence)))
        found |= {text.tokens: text for text in latest.texts if text.tokens not in found}
    if unexplained is None:
        return first
    return _outcome(first, ledger, found, unexplained, late=budget.late)


def _for_backbone(rest: dict[str, Tensor], evidence: Evidence) -> Mapping[str, Tensor]:
    """What remains, by the backbone's names."""
    return Update(rest).for_backbone(evidence.adapter.network)


def _outcome(
    first: Outcome, ledger: Ledger, found: Mapping[Ids, FoundText], unexplained: float, *, late: bool
) -> Outcome:
    """The texts that were entered, then those of the first search that were not, under the verdict."""
    counts = ledger.counts
    assert counts is not None
    entered = []
    for text, labels in zip(ledger.texts, counts.labels.tolist(), strict=True):
        classes = tuple(label for label, times in enumerate(labels) for _ in range(times))
        by = Confirmation(Certainty.WHOLE, (*found[text].confirmation.taps, *filter(None, [ledger.tap])))
        entered.append(replace(found[text], confirmation=by, labels=classes, copies=len(classes)))
    certified = ledger.complete and unexplained <= constants().certified
    others = [] if certified else [text for text in first.texts if text.tokens not in ledger.texts]
    size = counts.size if ledger.complete else None
    status, diagnosis = _verdict(first, ledger, unexplained, certified=certified, late=late)
    return Outcome(status, diagnosis, (*entered, *others), size=size, unexplained=unexplained)


def _verdict(first: Outcome, ledger: Ledger, unexplained: float, *, certified: bool, late: bool) -> tuple[Status, str]:
    """Status and one sentence."""
    counts = ledger.counts
    assert counts is not None
    texts = sum(counts.copies)
    if certified:
        return Status.CERTIFIED, (
            f"the batch has {texts} {'text' if texts == 1 else 'texts'}: simulated with labels and counts, "
            f"they leave {unexplained:.0e} of the update unexplained"
        )
    if ledger.complete:
        reason = (
            f"the weights of {texts} texts add up to the batch, and leave {unexplained:.2g} of the update unexplained"
        )
        return (first.status if first.status.rows_explained else Status.ENDS_CONFIRMED), reason
    reason = f"{texts} of about {counts.size} texts are weighed; without them {unexplained:.0%} of the update is left"
    return (Status.OUT_OF_TIME if late else Status.PARTIAL), reason
