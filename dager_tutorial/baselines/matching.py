"""The loop that all these attacks share: embeddings move down a distance of gradients, several guesses at a time.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, optim

from dager_tutorial.baselines.distances import Distance
from dager_tutorial.baselines.dummy import Chances, DummyStep, Vectors
from dager_tutorial.errors import DagerError, quote
from dager_tutorial.server.budget import Budget

DECAY_EVERY = 50
"""Steps after which the learning rate falls: LAMP's, and its authors' for the attacks before it."""

OPTIMISERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "lbfgs": lambda parameters, lr: optim.LBFGS(parameters, lr=lr, line_search_fn="strong_wolfe"),
}
"""Optimisers by name. L-BFGS takes up to 20 gradients a step, and one step length for all guesses."""


@dataclass(frozen=True)
class Schedule:
    """How the optimisation goes.

    Attributes:
        steps: Of the optimiser.
        learning_rate: Its first one.
        decay: The factor on it every `DECAY_EVERY` steps.
        optimiser: One of `OPTIMISERS`.
        restarts: How many guesses are optimised side by side; the one with the smallest distance is the answer.
        small_start: Whether the first guesses have the mean norm of embeddings. Published attacks but LAMP draw entries
            of deviation one, which is many times larger.

    Raises:
        DagerError: A number that no run can have, or an unknown optimiser.

    Example:
        >>> Schedule(steps=100).learning_rate
        0.1
    """

    steps: int = 2500
    learning_rate: float = 0.1
    decay: float = 1.0
    optimiser: str = "adam"
    restarts: int = 1
    small_start: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("steps", "learning_rate", "decay", "restarts"):
            if not getattr(self, name) > 0:
                raise DagerError(f"{name} is {getattr(self, name)}: give a positive number")
        if self.optimiser not in OPTIMISERS:
            raise DagerError(f"optimiser is {quote(self.optimiser)}: choose one of {', '.join(OPTIMISERS)}")


@dataclass
class Best:
    """The best guess of each restart so far, and how the loss went.

    Attributes:
        vectors: Embeddings.
        loss: What they came to.
        history: For every gradient that was taken, the smallest loss of all restarts.
    """

    vectors: Vectors
    loss: Float[Tensor, " guesses"]
    history: list[float] = field(default_factory=list)

    def keep(self, vectors: Vectors, loss: Float[Tensor, " guesses"]) -> None:
        """Take over the guesses that are better than before.

        Args:
            vectors: Embeddings.
            loss: What they came to.
        """
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.vectors = torch.where(better[:, None, None, None], vectors, self.vectors)
        self.history.append(float(loss.min()))

    @property
    def first(self) -> Float[Tensor, "texts length width"]:
        """The best of all restarts."""
        return self.vectors[int(self.loss.argmin())]


Penalty = Callable[[Vectors], Float[Tensor, " guesses"]]
"""What is added to the distances of guesses."""


class Matching:
    """One run of gradient matching.

    Args:
        step: The client's step, simulated.
        distance: How gradients are compared.
        schedule: How the optimisation goes.
        budget: What it may cost; its seed draws what is random.
        start: The first guesses.
        penalty: Added to the distances; nothing by default.
    """

    def __init__(
        self,
        step: DummyStep,
        distance: Distance,
        schedule: Schedule,
        budget: Budget,
        start: Vectors,
        penalty: Penalty | None = None,
    ) -> None:
        self.step, self.distance, self.budget, self.penalty = step, distance, budget, penalty
        self.steps = schedule.steps
        self.vectors = step.framed(start).clone().requires_grad_()
        self.labels = _labels(step, len(start), budget)
        unknown = [self.vectors] + ([self.labels] if self.labels.requires_grad else [])
        self.optimiser = OPTIMISERS[schedule.optimiser](unknown, lr=schedule.learning_rate)
        self.rate = optim.lr_scheduler.StepLR(self.optimiser, DECAY_EVERY, schedule.decay)
        self.best = Best(self.vectors.detach().clone(), torch.full([len(start)], torch.inf, device=start.device))

    @property
    def chances(self) -> Chances:
        """The labels of each guess: those that were told, or those that are optimised."""
        return self.labels.softmax(-1) if self.labels.requires_grad else self.labels

    def losses(self) -> Float[Tensor, " guesses"]:
        """What each guess comes to."""
        distances = self.step.distances(self.vectors, self.chances, self.distance, self.budget)
        return distances if self.penalty is None else distances + self.penalty(self.vectors)

    def run(self) -> Iterator[int]:
        """Optimise, until all steps are done or the budget is spent.

        Yields:
            The number of steps done, after each; whoever iterates may change `vectors` in place.
        """
        for number in range(1, self.steps + 1):
            if self.budget.late:
                return
            self.optimiser.step(self._loss)
            self.rate.step()
            self.budget.report("matching", number, self.steps)
            yield number

    def _loss(self) -> float:
        """One evaluation of all guesses, its gradient left with what is optimised."""
        self.optimiser.zero_grad()
        losses = self.losses()
        total = losses.sum()
        total.backward()
        self.best.keep(self.vectors.detach().clone(), losses.detach())
        return float(total.detach())


def normal_start(step: DummyStep, guesses: int, generator: torch.Generator, *, small: bool = False) -> Vectors:
    """Guesses of normal random numbers.

    Args:
        step: The client's step.
        guesses: How many.
        generator: The source of randomness.
        small: Whether each vector has the mean norm of embeddings; else each entry has deviation one.
    """
    drawn = torch.randn(guesses, *step.fixed.shape, generator=generator).to(step.fixed)
    return step.nearest.sized(drawn) if small else drawn


def _labels(step: DummyStep, guesses: int, budget: Budget) -> Tensor:
    """The labels as told, the same for every guess; else what their probabilities are optimised from."""
    if step.told.labels is not None:
        return step.chances.expand(guesses, -1, -1)
    shape = guesses, step.told.batch_size, step.network.config.num_labels
    return torch.randn(shape, generator=budget.generator()).to(step.model.device).requires_grad_()
