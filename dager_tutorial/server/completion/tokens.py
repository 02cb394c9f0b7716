"""Completion under losses that read every token: whole texts, what masks hid, the proof (chapter `09_completion`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dager_tutorial.server.completion.remainder import explains, remainder_of, scaled_remainder_of
from dager_tutorial.server.completion.scaled import explained
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.completion.targets import TargetCounts, masked_targets, next_token_targets, objective_of
from dager_tutorial.server.constants import constants
from dager_tutorial.server.outcome import FoundText, Outcome
from dager_tutorial.status import Certainty, Confirmation, Status


def with_targets(
    simulator: Simulator, received: Mapping[str, Tensor], first: Outcome, precision: torch.dtype
) -> Outcome | None:
    """Read targets off the last block, and prove them by simulating the step.

    Args:
        simulator: Repeats the client's step.
        received: The shared gradients by the update's names.
        first: What the search found.
        precision: The client's.

    Returns:
        The texts with what the loss asked for; None where the targets explain nothing of the update.
    """
    counts = _targets(simulator, received, first, precision)
    if counts is not None:
        unexplained = remainder_of(simulator, received, counts.texts, objective_of(counts)).share
        if explains(unexplained, precision):
            return _outcome(counts, first, unexplained)
    # Under an unknown factor counts do not tell that no text is missing: the search must have.
    told = first.status.claims_all and simulator.sent[0] is None
    counts = _targets(simulator, received, first, precision, scaled=True) if told else None
    if counts is None:
        return None
    left = scaled_remainder_of(simulator, received, counts.texts, objective_of(counts))
    if left.share > constants().certified:
        return None
    return replace(_outcome(counts, first, left.share), diagnosis=explained(sum(counts.copies), left))


def _targets(
    simulator: Simulator,
    received: Mapping[str, Tensor],
    first: Outcome,
    precision: torch.dtype,
    *,
    scaled: bool = False,
) -> TargetCounts | None:
    """The targets of what was found, if they leave no doubt.

    Counts that do not add up, or rows that several sets of texts explain, prove nothing, whatever they leave.
    """
    read = next_token_targets if simulator.head.task == "next_token" else masked_targets
    eps = torch.finfo(precision).eps
    counts = read(simulator, received, [text.tokens for text in first.texts], eps, scaled=scaled)
    return counts if counts is not None and counts.texts and counts.complete and not counts.unclear else None


def _outcome(counts: TargetCounts, first: Outcome, unexplained: float) -> Outcome:
    """The whole texts, certified or as sure as their rows."""
    certified = unexplained <= constants().certified
    old = {text.tokens: text for text in first.texts}
    texts = tuple(
        _found(whole, seen, copies, old, certified=certified)
        for whole, seen, copies in zip(_wholes(counts), counts.texts, counts.copies, strict=True)
    )
    number = sum(counts.copies)
    said = f"{number} {'text' if number == 1 else 'texts'} with all targets, simulated, leave {unexplained:.0e}"
    status = Status.CERTIFIED if certified else first.status
    reason = f"{said} of the update unexplained"
    return Outcome(status, reason, texts, with_targets=True, size=number, unexplained=unexplained)


def _found(whole: Ids, seen: Ids, copies: int, old: Mapping[Ids, FoundText], *, certified: bool) -> FoundText:
    """A whole text, with the ratio and the taps of the longest text that the search found of it."""
    like = next((old[seen[:end]] for end in range(len(seen), 0, -1) if seen[:end] in old), None)
    ratio = max((text.ratio for text in old.values()), default=1.0) if like is None else like.ratio
    taps = () if like is None else like.confirmation.taps
    return FoundText(whole, ratio, Confirmation(Certainty.WHOLE if certified else Certainty.ROWS, taps), copies=copies)


def _wholes(counts: TargetCounts) -> list[Ids]:
    """The texts before any token was masked; under the next-token loss they are whole already."""
    if not counts.targets:
        return list(counts.texts)
    return [_unmasked(text, asked) for text, asked in zip(counts.texts, counts.targets, strict=True)]


def _unmasked(text: Ids, asked: tuple[tuple[int, int], ...]) -> Ids:
    """A text with the tokens that were asked for in their places.

    >>> _unmasked((5, 0, 7), ((1, 6),))
    (5, 6, 7)
    """
    most = {position: token for (position, token), _ in reversed(Counter(asked).most_common())}
    return tuple(most.get(position, token) for position, token in enumerate(text))
