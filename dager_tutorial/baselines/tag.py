"""TAG: gradient matching in squared plus weighted absolute distance.

Deng et al., TAG: Gradient Attack on Transformer-based Language Models, Findings of EMNLP 2021 (arXiv 2103.06819).

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from dager_tutorial.baselines.distances import squared_and_absolute
from dager_tutorial.baselines.dlg import PUBLISHED, descend
from dager_tutorial.baselines.dummy import DummyStep
from dager_tutorial.baselines.matched import Matched
from dager_tutorial.baselines.matching import Schedule
from dager_tutorial.baselines.told import Told
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.update import Update

ABSOLUTE_WEIGHT = 0.01
"""Weight of the absolute distance in the comparisons of LAMP's authors; the paper lets it fall from layer to layer."""


def tag(
    model: LanguageModel,
    update: Update,
    told: Told,
    *,
    head: Head | None = None,
    schedule: Schedule = PUBLISHED,
    budget: Budget | None = None,
) -> Matched:
    """Attack an update the way of TAG.

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
    step = DummyStep(model, update, told, head)
    return descend(step, squared_and_absolute(ABSOLUTE_WEIGHT), schedule, budget or Budget())
