"""Completion: the texts of a search weighed, taken off the update, the rest searched again, all of it proven.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.guess import plausible_heads
from dager_tutorial.server.completion.head import find_head
from dager_tutorial.server.completion.ledger import Ledger
from dager_tutorial.server.completion.remainder import explains
from dager_tutorial.server.completion.scaled import behind_scale
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.completion.tokens import with_targets
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
    if not outcome.texts or budget.late:
        return outcome

    def under(head: Head) -> Outcome | None:
        simulator = Simulator(model, update, head, evidence.precision)
        if head.task == "classification":
            ledger = Ledger(simulator, evidence, update.gradients)
            found = peeled(evidence, ledger, outcome, search, budget)
            certain = found is not None and found.status is Status.CERTIFIED
            return found if certain else behind_scale(ledger, outcome) or found
        return with_targets(simulator, update.gradients, outcome, evidence.precision)

    heads = [head] if head is not None else plausible_heads(update, evidence.adapter)
    with evidence.watch.stage("completion"):
        better = next(filter(None, map(under, heads)), None)
        if heads[0].task == "classification" and (better is None or _doubtful(outcome, better)):
            other = _with_another_head(model, update, evidence, outcome, under)
            better = min(filter(None, (better, other)), key=_left, default=None)
    return better or outcome


def _doubtful(outcome: Outcome, better: Outcome) -> bool:
    """Whether a head that was named leaves much though no text is missing: the client may have had another."""
    return outcome.status.claims_all and better.size is None and better.status is not Status.CERTIFIED


def _left(outcome: Outcome) -> float:
    """The share of the update that is not explained."""
    return 1.0 if outcome.unexplained is None else outcome.unexplained


def _with_another_head(
    model: LanguageModel,
    update: Update,
    evidence: Evidence,
    outcome: Outcome,
    under: Callable[[Head], Outcome | None],
) -> Outcome | None:
    """Complete with a head that the update itself gives away; labels are left out where classes may be swapped."""
    found = find_head(model, update, [text.tokens for text in outcome.texts], evidence.precision)
    completed = None if found.head is None else under(found.head)
    if completed is None:
        return None
    told = completed.diagnosis + "; the head was not the one that was named, and was found in the update"
    texts = completed.texts
    if not found.numbered:
        told += ", its classes known up to a swap: labels are left out"
        texts = tuple(replace(text, labels=()) for text in texts)
    return replace(completed, diagnosis=told, texts=texts)


def peeled(evidence: Evidence, ledger: Ledger, first: Outcome, search: Search, budget: Budget) -> Outcome | None:
    """Weigh the texts that a search found, take them off the update and search what remains, until all is explained.

    Args:
        evidence: What the update says.
        ledger: Its account, with no text entered yet.
        first: What the search made of the whole update.
        search: Searches an update.
        budget: What it may cost.

    Returns:
        None where no text could be weighed; else the texts of all rounds, with labels and counts, the
        share of the update that they leave unexplained, and the status that fits.
    """
    found = {text.tokens: text for text in first.texts}
    unexplained: float | None = None
    latest = first
    while ledger.enter([text.tokens for text in latest.texts]):
        rest = ledger.remainder()
        unexplained = rest.share  # it may rise above 1: terms of opposite labels cancel in the sum
        if ledger.complete or unexplained <= constants().certified or budget.late:
            break
        budget.report("completion", len(ledger.texts), ledger.size)
        latest = search(evidence.less(Update(rest.tensors).for_backbone(evidence.adapter.network)))
        found |= {text.tokens: text for text in latest.texts if text.tokens not in found}
    exact = torch.finfo(evidence.precision).eps < constants().certified
    if unexplained is None or not (exact or explains(unexplained, evidence.precision)):
        return None  # in 16 bits a weight proves nothing alone
    texts = _entered(ledger, found, labelled=unexplained < 1.0)
    if ledger.complete and explains(unexplained, evidence.precision):
        return Outcome(*_explained(first, ledger, unexplained), tuple(texts), size=ledger.size, unexplained=unexplained)
    # A client that scales its update has the right rest under a size that the counts do not fill: that proves nothing.
    texts += [text for text in first.texts if text.tokens not in ledger.texts]
    return Outcome(*_partial(first, ledger, unexplained, late=budget.late), tuple(texts), unexplained=unexplained)


def _entered(ledger: Ledger, found: Mapping[Ids, FoundText], *, labelled: bool) -> list[FoundText]:
    """The texts of the account with the map that confirms them besides what did before, and with labels and counts."""
    texts = []
    for text, classes in ledger.classes.items():
        by = Confirmation(Certainty.WHOLE, tuple(dict.fromkeys((*found[text].confirmation.taps, ledger.tap))))
        one = replace(found[text], confirmation=by)
        texts.append(replace(one, labels=classes, copies=len(classes)) if labelled else one)
    return texts


def _explained(first: Outcome, ledger: Ledger, unexplained: float) -> tuple[Status, str]:
    """The verdict where nothing is missing."""
    number = sum(map(len, ledger.classes.values()))
    reason = (
        f"the batch has {number} {'text' if number == 1 else 'texts'}: simulated with labels and counts "
        f"{'it leaves' if number == 1 else 'they leave'} {unexplained:.0e} of the update unexplained"
    )
    if unexplained <= constants().certified:
        return Status.CERTIFIED, reason
    return (first.status if first.status.rows_explained else Status.ENDS_CONFIRMED), reason


def _partial(first: Outcome, ledger: Ledger, unexplained: float, *, late: bool) -> tuple[Status, str]:
    """The verdict where something is: that of the search, where it has found all."""
    number = sum(map(len, ledger.classes.values()))
    reason = f"{number} of about {ledger.size} texts are weighed; {min(unexplained, 1.0):.0%} of the update is left"
    if first.status.claims_all:
        return first.status, f"{first.diagnosis}; but {reason}: it was scaled, clipped or computed in another way"
    return (Status.OUT_OF_TIME if late else Status.PARTIAL), reason
