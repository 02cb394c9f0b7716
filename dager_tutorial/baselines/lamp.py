"""LAMP: gradient matching that a norm keeps among embeddings, and moves that a language model judges.

Balunovic, Dimitrov, Jovanovic and Vechev, LAMP: Extracting Text from Gradients with Language Model Priors, NeurIPS 2022
(arXiv 2202.08827). Continuous steps and discrete moves take turns: a descent finds tokens and hardly ever their order.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.baselines.distances import Distance, cosine, squared_and_absolute
from dager_tutorial.baselines.dummy import DummyStep, Vectors
from dager_tutorial.baselines.matched import Matched, matched
from dager_tutorial.baselines.matching import Matching, Schedule, normal_start
from dager_tutorial.baselines.moves import proposals
from dager_tutorial.baselines.prior import Prior
from dager_tutorial.baselines.tag import ABSOLUTE_WEIGHT
from dager_tutorial.baselines.told import Told
from dager_tutorial.errors import DagerError
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.stopwatch import Stopwatch
from dager_tutorial.update import Update

PUBLISHED = Schedule(steps=2000, learning_rate=0.01, decay=0.89)
"""As LAMP's authors publish it."""


@dataclass(frozen=True)
class LampOptions:
    """What LAMP adds to a descent. The defaults are those published for its cosine variant.

    Attributes:
        distance: How gradients are compared.
        prior_weight: Weight of the language prior when moves are judged.
        norm_weight: Weight of the squared difference between the mean norm of the guess and that of embeddings.
        candidates: Random guesses of which the nearest is taken, and as many of its orders after that.
        proposals: Orders that are tried for each text at a time.
        every: Steps between two times.
        burn_in: Share of the steps before the first.
    """

    distance: Distance = cosine
    prior_weight: float = 0.2
    norm_weight: float = 1.0
    candidates: int = 500
    proposals: int = 200
    every: int = 75
    burn_in: float = 0.1


COSINE = LampOptions()
L1_L2 = LampOptions(squared_and_absolute(ABSOLUTE_WEIGHT), prior_weight=60.0, norm_weight=25.0)
"""The two published variants; the second one's weights belong to gradients of the size that BERT's have."""


def lamp(
    model: LanguageModel,
    update: Update,
    told: Told,
    prior: Prior,
    *,
    head: Head | None = None,
    options: LampOptions = COSINE,
    schedule: Schedule = PUBLISHED,
    budget: Budget | None = None,
) -> Matched:
    """Attack an update the way of LAMP.

    Args:
        model: The model both sides know.
        update: What the client sent.
        told: Lengths of the texts and their labels.
        prior: How likely texts are: `prior.LanguagePrior`, or any other judge.
        head: The head that the server handed out; the default one where None.
        options: What it adds to a descent.
        schedule: How the descent goes.
        budget: What it may cost.

    Raises:
        DagerError: The update or what was told cannot be used.
    """
    step = DummyStep(model, update, told, head)
    return _Lamp(step, prior, options, schedule, budget or Budget()).run()


class _Lamp:
    """One run: a start chosen among many, then descent and moves in turn."""

    def __init__(self, step: DummyStep, prior: Prior, options: LampOptions, schedule: Schedule, budget: Budget) -> None:
        if step.told.labels is None:
            raise DagerError("LAMP is told the labels: give them with the lengths")
        self.step, self.prior, self.options, self.schedule, self.budget = step, prior, options, schedule, budget
        self.chance, self.generator = random.Random(budget.seed), budget.generator()
        self.chances = step.chances[None]

    def run(self) -> Matched:
        """Take steps and moves in turn."""
        watch, done = Stopwatch(), 0
        with watch.stage("matching"):
            start = torch.stack([self._start() for _ in range(self.schedule.restarts)])
            run = Matching(self.step, self.options.distance, self.schedule, self.budget, start, self._penalty)
            for done in run.run():
                if done % self.options.every == 0 and done > self.options.burn_in * self.schedule.steps:
                    with watch.stage("moves"):
                        self._move(run.vectors)
        return matched(self.step, run.best, done, watch)

    def _penalty(self, vectors: Vectors) -> Float[Tensor, " guesses"]:
        """How far the mean norm is from that of embeddings."""
        norms = vectors.norm(dim=-1)[:, self.step.free].mean(-1)
        return self.options.norm_weight * (norms - self.step.nearest.usual_norm).square()

    def _start(self) -> Float[Tensor, "texts length width"]:
        """The nearest of many random guesses, then the nearest of many orders of it, at the size of embeddings."""
        guesses = normal_start(self.step, self.options.candidates, self.generator)
        best = guesses[self._distances(guesses).argmin()]
        orders = torch.stack([self._orders(text, self.options.candidates) for text in range(len(best))], 1)
        guesses = best.expand(len(orders), *best.shape).gather(2, orders[..., None].expand(-1, -1, -1, best.shape[-1]))
        best = guesses[self._distances(guesses).argmin()]
        return self.step.nearest.sized(best)

    def _orders(self, text: int, count: int) -> Int[Tensor, "count length"]:
        """Random orders of a text's free places, the present one first."""
        free = self._places(text)
        orders = torch.arange(self.step.free.shape[1]).repeat(count, 1)
        for order in orders[1:]:
            order[free] = torch.tensor(free)[torch.randperm(len(free), generator=self.generator)]
        return orders.to(self.step.free.device)

    def _places(self, text: int) -> list[int]:
        """Where a text's unknown tokens stand."""
        return self.step.free[text].nonzero().flatten().tolist()

    @torch.no_grad()
    def _move(self, vectors: Vectors) -> None:
        """Give each text of each guess the best of many orders, in place."""
        for guess in vectors:
            for text in range(len(guess)):
                guess.copy_(self._reordered(guess, text))

    def _reordered(self, guess: Float[Tensor, "texts length width"], text: int) -> Float[Tensor, "texts length width"]:
        """A guess with the best order of one of its texts: gradient and language are judges."""
        length = len(self.step.frames[text])
        orders = proposals(self._places(text), guess.shape[1], self.options.proposals, self.chance)
        tried = guess.repeat(len(orders), 1, 1, 1)
        tried[:, text] = guess[text][orders]
        ids = torch.tensor(self.step.nearest.texts(guess[text : text + 1], self.step.frames[text : text + 1])[0])
        texts = [self.step.model.text_of(row) for row in ids[orders[:, :length]].tolist()]
        language = self.prior(texts).to(guess) / self.step.told.batch_size
        return tried[(self._distances(tried) + self.options.prior_weight * language).argmin()]

    @torch.no_grad()
    def _distances(self, guesses: Vectors) -> Float[Tensor, " guesses"]:
        """Distances of many guesses; infinite for those that the time did not allow but the first."""
        found = torch.full([len(guesses)], torch.inf, device=guesses.device)
        for place, guess in enumerate(guesses):
            if place and self.budget.late:
                break
            found[place] = self.step.distances(guess[None], self.chances, self.options.distance, self.budget)[0]
        return found
