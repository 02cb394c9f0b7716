"""The proof where the whole update was multiplied by a number that nobody told, as clipping does.

Chapter `09_completion`.
"""

from __future__ import annotations

from dataclasses import replace

from dager_tutorial.server.completion.ledger import Ledger
from dager_tutorial.server.completion.remainder import Scaled, scaled_remainder_of
from dager_tutorial.server.completion.simulation import of_logits
from dager_tutorial.server.constants import constants
from dager_tutorial.server.outcome import Outcome
from dager_tutorial.status import Certainty, Confirmation, Status


def behind_scale(ledger: Ledger, first: Outcome) -> Outcome | None:
    """Certify the texts of a classification whose update was multiplied by a number, or each tensor by its own.

    Under an unknown number a sum does not tell how many terms it has: that no text is missing the search must have
    found first. Of one text and two classes it does not tell the labels either, as both pull the same way.

    Args:
        ledger: The account of the update.
        first: What the search found.

    Returns:
        None where the texts do not explain the update.
    """
    texts = tuple(text.tokens for text in first.texts)
    exact = ledger.simulator.sent[0] is None  # on a grid no factor is told from rounding
    counts = ledger.up_to_scale(texts) if first.status.claims_all and exact else None
    if counts is None:
        return None
    left = scaled_remainder_of(ledger.simulator, ledger.received, texts, of_logits(counts.gradients))
    if left.share > constants().certified:
        return None
    told = len(texts) > 1 or counts.labels.shape[1] > 2
    found = []
    for text, times in zip(first.texts, counts.labels.tolist(), strict=True):
        by = Confirmation(Certainty.WHOLE, tuple(dict.fromkeys((*text.confirmation.taps, ledger.tap))))
        labels = tuple(label for label, copies in enumerate(times) for _ in range(copies))
        found.append(replace(text, confirmation=by, labels=labels, copies=len(labels)) if told else text)
    return Outcome(
        Status.CERTIFIED,
        explained(counts.size, left),
        tuple(found),
        size=counts.size if told else None,
        unexplained=left.share,
    )


def explained(number: int, left: Scaled) -> str:
    """What is said of texts that explain an update up to a scale.

    Args:
        number: How many texts there are.
        left: What they leave.
    """
    how = f"multiplied by {left.least:.1e}" + f" to {left.most:.1e}" * (left.most > 1.001 * left.least)
    said = f"{number} {'text' if number == 1 else 'texts'}, simulated and {how}, leave {left.share:.0e}"
    return f"{said} of the update unexplained: it was clipped or scaled"
