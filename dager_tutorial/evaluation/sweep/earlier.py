"""The attacks that came before, for sweeps: what each is told of the batch is part of what it is.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dager_tutorial.baselines import PRIOR
from dager_tutorial.baselines.prior import LanguagePrior, Prior
from dager_tutorial.baselines.run import METHODS, Effort, attack_by
from dager_tutorial.evaluation.priors import told_of
from dager_tutorial.evaluation.sweep.attacker import Attacker, Found, Received
from dager_tutorial.evaluation.sweep.known import check_names
from dager_tutorial.server.budget import AttackConfig, Budget
from dager_tutorial.zoo.names import load_model


@dataclass(frozen=True)
class EarlierOptions:
    """What an attack by gradient matching may cost, and what it knows.

    Attributes:
        effort: How much it may try.
        limits: Its time, and the seed of its guesses.
        labels: Whether it is told the labels.
        prior: The causal model that judges LAMP's moves.
    """

    effort: Effort
    limits: AttackConfig
    labels: bool = True
    prior: str = PRIOR


def _read(options: Mapping[str, Any]) -> EarlierOptions:
    efforts, limits, own = {field.name for field in fields(Effort)}, {"time_budget", "seed"}, {"labels", "prior"}
    check_names("attack", options, efforts | limits | own)
    parts = ({name: value for name, value in options.items() if name in some} for some in (efforts, limits, own))
    effort, limit, rest = parts
    return EarlierOptions(Effort(**effort), AttackConfig(**limit), **rest)


def _run(method: str, received: Received, options: EarlierOptions) -> Found:
    told = told_of(received.truth, labels=options.labels)
    judge = _judge(options.prior, str(received.model.device)) if method == "lamp" else None
    budget = Budget.of(options.limits, time.perf_counter())
    result = attack_by(
        method,
        received.model,
        received.update,
        told,
        head=received.head,
        prior=judge,
        effort=options.effort,
        budget=budget,
    )
    return Found(result.found, {"steps": result.steps, "smallest_loss": min(result.losses, default=None)})


@functools.lru_cache(maxsize=1)
def _judge(name: str, device: str) -> Prior:
    """The prior, loaded once: no attack's seconds but the first one's count it."""
    return LanguagePrior(load_model(name, device=device))


def _runner(method: str) -> Callable[[Received, EarlierOptions], Found]:
    return functools.partial(_run, method)


EARLIER = {method: Attacker(_read, _runner(method)) for method in METHODS}
"""By name."""
