"""The command that runs the attacks that came before, which are told what the server does not know."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from dager_tutorial.baselines import PRIOR
from dager_tutorial.cli import display
from dager_tutorial.cli.options import (
    BatchOptions,
    ClientOptions,
    Labels,
    ModelOptions,
    OutputOptions,
    Seed,
    TimeBudget,
    flattened,
)
from dager_tutorial.cli.progress import progress, stoppable, waiting
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.baselines.prior import Prior
    from dager_tutorial.baselines.run import Effort

PRIOR_HELP = f"Causal model that judges lamp's moves; {PRIOR} by default."


@dataclass(frozen=True)
class EffortOptions:
    """How much an attack by gradient matching may try."""

    steps: Annotated[int | None, Option("--steps", min=1, help="Steps of the optimiser; as published.")] = None
    restarts: Annotated[int, Option("--restarts", min=1, help="Guesses that are optimised side by side.")] = 1
    candidates: Annotated[
        int | None, Option("--candidates", min=1, help="lamp's random guesses before the first step; 500.")
    ] = None
    proposals: Annotated[
        int | None, Option("--proposals", min=1, help="Orders that lamp tries for each text at a time; 200.")
    ] = None

    def effort(self) -> Effort:
        """The same, for the attack."""
        from dager_tutorial.baselines.run import Effort

        return Effort(**vars(self))


@flattened
def baseline(
    *,
    method: Annotated[Literal["dlg", "tag", "lamp"], Option("--method", help="Which attack.")],
    model: ModelOptions,
    batch: BatchOptions,
    label: Labels = None,
    client: ClientOptions,
    effort: EffortOptions,
    tell_labels: Annotated[bool, Option(help="Tell the labels; else dlg and tag optimise them, too.")] = True,
    prior: Annotated[str | None, Option("--prior", help=PRIOR_HELP)] = None,
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Attack a batch as was done before: match gradients, told how many texts, how long, and of which class."""
    _check(method, tell_labels, prior, effort)
    texts, labels = batch.draw(seed, label)
    config, language_model = client.config(seed), model.load()
    judge = load_prior(prior or PRIOR, model.device) if method == "lamp" else None
    from dager_tutorial.baselines.run import attack_by
    from dager_tutorial.client.step import head_of, play
    from dager_tutorial.evaluation import metrics
    from dager_tutorial.evaluation.priors import told_of
    from dager_tutorial.server.budget import AttackConfig, Budget

    update, truth = play(language_model, texts, labels, config=config)
    told, head = told_of(truth, labels=tell_labels), head_of(config, truth.labels)
    with progress() as advance, stoppable() as stop:
        limits = AttackConfig(seed=seed, time_budget=time_budget, stop=stop)
        budget = Budget.of(limits, time.perf_counter(), advance)
        result = attack_by(
            method, language_model, update, told, head=head, prior=judge, effort=effort.effort(), budget=budget
        )
    points = metrics.score(result.found, truth)
    run: dict[str, Any] = {
        "method": method,
        "told_lengths": told.lengths,
        "told_labels": told.labels,
        "steps": result.steps,
    }
    run |= {"first_loss": result.losses[0], "smallest_loss": min(result.losses)} if result.losses else {}
    shown = display.beside_table(points.pairs), display.scores_table(points.to_json())
    results.finish(run | result.found.to_json() | points.to_json(), display.facts(run), *shown)


def load_prior(name: str, device: str) -> Prior:
    """The language model that judges LAMP's moves.

    Args:
        name: A causal model, named as for `--model`.
        device: Where to compute.

    Raises:
        DagerError: It cannot be loaded, or is no causal model.
    """
    with waiting(f"loading the prior {name}"):
        from dager_tutorial.baselines.prior import LanguagePrior
        from dager_tutorial.zoo.names import load_model

        return LanguagePrior(load_model(name, device=device))


def _check(method: str, tell_labels: bool, prior: str | None, effort: EffortOptions) -> None:
    """Refuse options of another method."""
    if method != "lamp" and not (prior is effort.candidates is effort.proposals is None):
        raise DagerError(f"--prior, --candidates and --proposals belong to lamp: leave them out for {method}")
    if method == "lamp" and not tell_labels:
        raise DagerError("--no-tell-labels belongs to dlg and tag: lamp is told the labels")
