"""DLG: embeddings whose gradient is nearest to the one received, in squared distance.

Zhu, Liu and Han, Deep Leakage from Gradients, NeurIPS 2019 (arXiv 1906.08935). There labels are optimised together with
the inputs, by L-BFGS; comparisons on text (LAMP, DAGER) tell it the labels and use Adam.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from dager_tutorial.baselines.distances import Distance, squared
from dager_tutorial.baselines.dummy import DummyStep
from dager_tutorial.baselines.matched import Matched, matched
from dager_tutorial.baselines.matching import Matching, Schedule, normal_start
from dager_tutorial.baselines.told import Told
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.stopwatch import Stopwatch
from dager_tutorial.update import Update

PUBLISHED = Schedule(steps=2500, learning_rate=0.1)
"""As the authors of LAMP ran DLG and TAG on text: Adam at a learning rate that stays."""

ORIGINAL = Schedule(steps=300, learning_rate=1.0, optimiser="lbfgs")
"""As the authors of DLG ran it."""


def dlg(
    model: LanguageModel,
    update: Update,
    told: Told,
    *,
    head: Head | None = None,
    schedule: Schedule = PUBLISHED,
    budget: Budget | None = None,
) -> Matched:
    """Attack an update the way of DLG.

    Args:
        model: The model both sides know.
        update: What the client sent.
        told: Lengths of the texts, and their labels unless they are to be optimised, too.
        head: The head that the server handed out; the default one where None.
        schedule: How the optimisation goes.
        budget: What it may cost.

    Raises:
        DagerError: The update or what was told cannot be used.
    """
    return descend(DummyStep(model, update, told, head), squared, schedule, budget or Budget())


def descend(step: DummyStep, distance: Distance, schedule: Schedule, budget: Budget) -> Matched:
    """Match gradients from random guesses on, with nothing else: DLG and TAG differ in the distance alone.

    Args:
        step: The client's step, simulated.
        distance: How gradients are compared.
        schedule: How the optimisation goes.
        budget: What it may cost.
    """
    watch = Stopwatch()
    start = normal_start(step, schedule.restarts, budget.generator(), small=schedule.small_start)
    run = Matching(step, distance, schedule, budget, start)
    with watch.stage("matching"):
        done = sum(1 for _ in run.run())
    return matched(step, run.best, done, watch)
