"""Any of the earlier attacks by its name, with fewer steps than published where time is short.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dager_tutorial.baselines.dlg import PUBLISHED, dlg
from dager_tutorial.baselines.lamp import COSINE, LampOptions, lamp
from dager_tutorial.baselines.lamp import PUBLISHED as PUBLISHED_LAMP
from dager_tutorial.baselines.matched import Matched
from dager_tutorial.baselines.matching import Schedule
from dager_tutorial.baselines.prior import Prior
from dager_tutorial.baselines.tag import tag
from dager_tutorial.baselines.told import Told
from dager_tutorial.errors import DagerError, quote
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.update import Update

METHODS = ("dlg", "tag", "lamp")


@dataclass(frozen=True)
class Effort:
    """How much an attack may try; None stands for what is published.

    Attributes:
        steps: Steps of the optimiser.
        restarts: Guesses side by side.
        candidates: LAMP's random guesses before the first step.
        proposals: LAMP's orders for each text at a time.

    Example:
        >>> Effort(steps=100).restarts
        1
    """

    steps: int | None = None
    restarts: int = 1
    candidates: int | None = None
    proposals: int | None = None

    def of(self, published: Schedule) -> Schedule:
        """A published schedule with this many steps and restarts.

        Args:
            published: The schedule.
        """
        return replace(published, steps=self.steps or published.steps, restarts=self.restarts)

    @property
    def lamp(self) -> LampOptions:
        """LAMP's options with so many candidates and proposals."""
        candidates, proposals = self.candidates or COSINE.candidates, self.proposals or COSINE.proposals
        return replace(COSINE, candidates=candidates, proposals=proposals)


def attack_by(
    method: str,
    model: LanguageModel,
    update: Update,
    told: Told,
    *,
    head: Head | None = None,
    prior: Prior | None = None,
    effort: Effort | None = None,
    budget: Budget | None = None,
) -> Matched:
    """Attack an update the way of DLG, TAG or LAMP.

    Args:
        method: One of `METHODS`.
        model: The model both sides know.
        update: What the client sent.
        told: What is known of the batch.
        head: The head that the server handed out; the default one where None.
        prior: The judge of LAMP's moves; the others have none.
        effort: How much it may try; as published where None.
        budget: What it may cost.

    Raises:
        DagerError: The method is unknown, LAMP has no prior, or the update or what was told cannot be used.
    """
    effort = effort or Effort()
    if method == "lamp" and prior is not None:
        schedule, options = effort.of(PUBLISHED_LAMP), effort.lamp
        return lamp(model, update, told, prior, head=head, options=options, schedule=schedule, budget=budget)
    plain = {"dlg": dlg, "tag": tag}.get(method)
    if plain is None:
        needs = "lamp needs a language prior: give one" if method == "lamp" else f"choose one of {', '.join(METHODS)}"
        raise DagerError(f"method {quote(method)} cannot run: {needs}")
    return plain(model, update, told, head=head, schedule=effort.of(PUBLISHED), budget=budget)
