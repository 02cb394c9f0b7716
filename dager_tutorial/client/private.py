"""DP-SGD: each text's own gradient is clipped, the sum is noised, and an accountant says what that promises.

Chapter `11_limits`. Needs the extra `opacus`, whose optimiser clips and noises and whose accountant counts.

Texts pass one by one, as Opacus' own virtual steps do: a text's gradient is then that of its own loss, no layer needs a
rule, and there is one text's gradient in memory.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dager_tutorial.client.batch import PrivateBatch, Truth, mini_batches, read_batch
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.constraints import Within, check_options, option
from dager_tutorial.client.defenses.clipping import length
from dager_tutorial.client.defenses.noise import generator
from dager_tutorial.client.step import Ready, as_update, gradients_of, ready, training
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update

ACCOUNTANT = "prv"
"""Opacus' own default: privacy loss random variables (Gopi et al., 2021)."""
CLIPPING_FLOOR = 1e-12


@dataclass(frozen=True)
class Privacy:
    """What DP-SGD promises, of whom, and over how many steps.

    Neighbours differ in one text. The promise holds for all steps together; an update is one of them.

    Attributes:
        epsilon: The promise.
        delta: How often it may be broken.
        clip: The largest length of one text's gradient.
        sample_rate: The chance of each text to be in a step (Poisson sampling): batch over data set. 1: every text
            is in every step, and nothing is gained by not knowing who is.
        steps: Steps that the budget is for.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> round(Privacy(epsilon=1.0).one_release, 2)
        4.84

    Chapter `11_limits`.
    """

    epsilon: float = option(8.0, Within(1e-3, 1e4, whole=False), "The promise of all steps together.")
    delta: float = option(1e-5, Within(1e-12, 0.5, whole=False), "How often the promise may be broken.")
    clip: float = option(1.0, Within(CLIPPING_FLOOR, whole=False), "The largest length of one text's gradient.")
    sample_rate: float = option(1.0, Within(1e-9, 1, whole=False), "The chance of each text to be in a step.")
    steps: int = option(1, Within(1, 10**7), "Steps that the budget is for.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)

    @property
    def told(self) -> str:
        """What is asked for; one release of all texts where no sampling and no steps are named."""
        many = f" rate={self.sample_rate:g} steps={self.steps}" if (self.sample_rate, self.steps) != (1.0, 1) else ""
        return f"DP-SGD epsilon={self.epsilon:g} delta={self.delta:g} clip={self.clip:g}{many}"

    @property
    def one_release(self) -> float:
        """The noise multiplier of a formula that some frameworks use: sqrt(2 ln(1.25 / delta)) / epsilon.

        It is for one release without sampling and proven for epsilon below 1; beyond, it adds too little noise.
        """
        return math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon


@dataclass(frozen=True)
class Accounting:
    """What the accountant says.

    Attributes:
        privacy: What was asked for.
        multiplier: Standard deviation of the noise on the sum over texts, in units of the clipping norm.
        epsilon: What the steps spend with it.
        formula_epsilon: What they spend with the formula of one release.
    """

    privacy: Privacy
    multiplier: float
    epsilon: float
    formula_epsilon: float

    @property
    def told(self) -> str:
        """What a server is told."""
        asked = self.privacy
        return (
            f"DP-SGD epsilon={self.epsilon:.3g} delta={asked.delta:g} clip={asked.clip:g} "
            f"multiplier={self.multiplier:.4g} rate={asked.sample_rate:g} steps={asked.steps}"
        )

    def deviation(self, texts: int) -> float:
        """Standard deviation of the noise on a number of an update, which is a mean over texts.

        Args:
            texts: Of the step.
        """
        return self.multiplier * self.privacy.clip / texts

    def to_json(self) -> dict[str, Any]:
        """The numbers that a reader asks for, the formula beside the accountant."""
        asked = self.privacy
        return {
            "epsilon": self.epsilon,
            "delta": asked.delta,
            "clip_per_text": asked.clip,
            "sample_rate": asked.sample_rate,
            "steps": asked.steps,
            "accountant": ACCOUNTANT,
            "noise_multiplier": self.multiplier,
            "one_release_multiplier": asked.one_release,
            "one_release_epsilon": self.formula_epsilon,
        }


@functools.cache
def accounted(privacy: Privacy) -> Accounting:
    """The noise that keeps a promise, by Opacus' accountant.

    Args:
        privacy: The promise.

    Raises:
        DagerError: Opacus is not there, or no noise keeps the promise.

    Chapter `11_limits`.
    """
    utils: Any = _opacus("accountants.utils")
    asked = {"target_epsilon": privacy.epsilon, "target_delta": privacy.delta, "accountant": ACCOUNTANT}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # see `spent`
            multiplier = utils.get_noise_multiplier(**asked, sample_rate=privacy.sample_rate, steps=privacy.steps)
    except ValueError as error:
        raise DagerError(f"no noise keeps epsilon {privacy.epsilon:g} ({error}): ask for a larger one") from None
    return Accounting(privacy, multiplier, spent(privacy, multiplier), spent(privacy, privacy.one_release))


def spent(privacy: Privacy, multiplier: float) -> float:
    """The epsilon that all steps spend with a noise multiplier.

    Args:
        privacy: Delta, sampling and steps.
        multiplier: The noise.

    Raises:
        DagerError: Opacus is not there.
    """
    accountant = _opacus("accountants").create_accountant(ACCOUNTANT)
    accountant.history = [(multiplier, privacy.sample_rate, privacy.steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a first guess by another accountant, and of logarithms of zero
        return float(accountant.get_epsilon(delta=privacy.delta))


def private_gradients(
    network: Ready,
    batch: PrivateBatch,
    config: ClientConfig,
    accounting: Accounting,
    draw: torch.Generator,
    expected: int | None = None,
) -> tuple[dict[str, Tensor], float]:
    """The gradient of one step of DP-SGD: the mean over texts of clipped gradients, with noise.

    Args:
        network: The client's network, in `step.training`.
        batch: The texts of the step, at least one.
        config: What the client does.
        accounting: Clipping and noise.
        draw: Where the noise comes from.
        expected: Texts that a step has on average, by which sums are divided; as many as there are when left out.

    Returns:
        The gradients by name, and the length of that mean before the noise, which stays with the client.

    Raises:
        DagerError: Opacus is not there.

    Chapter `11_limits`.
    """
    texts = list(mini_batches(batch, 1))
    expected = expected or len(texts)
    own = gradients_of(network, texts[0], config)
    # Opacus' optimiser keeps its sums in parameters: these have the gradients' shapes and take no memory.
    stand_ins = {name: nn.Parameter(torch.zeros((), dtype=each.dtype).expand(each.shape)) for name, each in own.items()}
    optimizer = _opacus("optimizers").DPOptimizer(
        torch.optim.SGD(list(stand_ins.values())),
        noise_multiplier=accounting.multiplier,
        max_grad_norm=accounting.privacy.clip,
        expected_batch_size=expected,
        generator=draw,
    )
    for place, text in enumerate(texts):
        own = own if place == 0 else gradients_of(network, text, config)
        for name, parameter in stand_ins.items():
            parameter.grad_sample = own[name][None]  # type: ignore[attr-defined]
        optimizer.signal_skip_step(do_skip=place + 1 < len(texts))
        optimizer.pre_step()
    sums: dict[str, Tensor] = {name: parameter.summed_grad for name, parameter in stand_ins.items()}  # type: ignore[attr-defined]
    noised = {name: parameter.grad for name, parameter in stand_ins.items() if parameter.grad is not None}
    return noised, length(sums) / expected


def play_privately(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    config: ClientConfig | None = None,
    accounting: Accounting,
) -> tuple[Update, Truth, float]:
    """Compute the update of one step of DP-SGD, and keep what the client knows.

    Args:
        model: The shared model.
        texts: The private batch.
        labels: See `step.client_update`.
        config: What the client does.
        accounting: See `accounted`.

    Returns:
        What the server receives, and what it must never see: the truth, and the length of the mean of the clipped
        gradients before the noise.

    Raises:
        DagerError: See `step.client_update`; or Opacus is not there.

    Chapter `11_limits`.
    """
    config = config or ClientConfig()
    batch = read_batch(model, texts, labels, config)
    network = ready(model, batch, config)
    with training(network, config):
        gradients, norm = private_gradients(network, batch, config, accounting, generator(config.seed))
    update = replace(as_update(gradients, model, config.dtype), defences=accounting.told)
    return update, batch.truth(model, config.task), norm


def _opacus(part: str) -> Any:
    """A module of Opacus, which is an extra."""
    try:
        return importlib.import_module(f"opacus.{part}")
    except ImportError:
        raise DagerError("DP-SGD needs the package opacus: pip install 'dager-tutorial[opacus]'") from None
