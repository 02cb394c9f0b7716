"""What an attack by gradient matching gives back.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dager_tutorial.baselines.dummy import DummyStep
from dager_tutorial.baselines.matching import Best
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.stopwatch import Stopwatch, peak_memory_mb


@dataclass(frozen=True)
class Matched:
    """The nearest tokens of the best embeddings, and how the loss went.

    Attributes:
        found: The answer; all of it is a guess, its scores are the smallest loss.
        losses: The loss of every gradient that was taken, of the best of all restarts.
        steps: How many steps of the optimiser were done.
    """

    found: Reconstruction
    losses: tuple[float, ...]
    steps: int


def matched(step: DummyStep, best: Best, steps: int, watch: Stopwatch) -> Matched:
    """The record of a run.

    Args:
        step: The client's step that was simulated.
        best: The best guesses.
        steps: How many steps were done.
        watch: The stages "matching" and "moves".
    """
    sequences = step.nearest.texts(step.framed(best.first[None])[0], step.frames)
    texts, loss = len(sequences), float(best.loss.min())
    labels = step.told.labels
    found = Reconstruction(
        sequences=sequences,
        texts=tuple(map(step.model.text_of, sequences)),
        scores=(loss,) * texts,
        status=Status.PARTIAL,
        confirmations=(Confirmation(Certainty.GUESS),) * texts,
        diagnosis=f"the tokens nearest to the best embeddings of {steps} steps (loss {loss:.3g}); nothing is confirmed",
        labels=() if labels is None else tuple((label,) for label in labels),
        seconds=watch.report("matching", "moves"),
        model=step.model.name,
        n_parameters_used=sum(each.numel() for each in step.received.values()),
        peak_rss_mb=peak_memory_mb(),
    )
    return Matched(found, tuple(best.history), steps)
