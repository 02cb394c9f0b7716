"""Hugging Face's Trainer: a callback that audits steps: what would this gradient give away, if it were sent?

Chapter `12_federated`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dager_tutorial.frameworks.capturing import gradients_of, save_beside, with_weights
from dager_tutorial.frameworks.policy import MINUTE
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.update import Update

Report = Callable[[int, Reconstruction], None]
"""Called with a step's number, from 1, and what the attack found in its gradient."""


class AuditingCallback(TrainerCallback):
    """A callback that attacks a step's gradient the moment before the optimiser uses it, and may keep it as a file.

    The gradient is the one of the whole step: accumulated over its batches, and clipped where the Trainer clips. The
    Trainer trains with dropout where the model's configuration has it; what an attack finds without is the worst case.

    Args:
        model: The model that is trained, for its tokenizer and architecture; it is read at the weights of the step.
        every: Audit the first step, and every so many steps.
        folder: Where the updates are kept, as `step-000001.safetensors`; None keeps none.
        limits: What an audit may cost; a minute by default.
        report: Who is told; by default the log.

    Example::

        shared = load_model("checkpoint")
        Trainer(network, arguments, train_dataset=rows, callbacks=[AuditingCallback(shared, every=100)]).train()

    Chapter `12_federated`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        every: int = 1,
        folder: str | os.PathLike[str] | None = None,
        limits: AttackConfig = MINUTE,
        report: Report | None = None,
    ) -> None:
        self.model, self.every, self.folder = model, every, folder
        self.limits, self.report = limits, report or _logged

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | nn.Module | None = None,
        **others: Any,
    ) -> None:
        """Audit a step.

        Args:
            args: The Trainer's.
            state: Its state, which counts the steps that are done.
            control: What a callback may ask of it; nothing is.
            model: The network that is trained.
            others: What else callbacks are told.
        """
        if state.global_step % self.every or model is None:
            return
        step, parameters = state.global_step + 1, dict(model.named_parameters())
        update = Update(gradients_of(parameters.items()), model=self.model.name)
        if self.folder is not None:
            save_beside(update, self.folder, f"step-{step:06d}")
        weights = {name: parameter.detach() for name, parameter in parameters.items()}
        head = _head_of(model, weights)
        self.report(step, attack(with_weights(self.model, weights), update, head=head, config=self.limits))


_TASKS = {"ForSequenceClassification": "classification", "ForMaskedLM": "masked", "ForCausalLM": "next_token"}


def _head_of(network: PreTrainedModel | nn.Module, weights: dict[str, Tensor]) -> Head | None:
    """The head in front of the backbone as it is now; None where it is of no known task."""
    name = type(network).__name__.replace("LMHeadModel", "ForCausalLM")
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    if task is None or not isinstance(network, PreTrainedModel):
        return None
    own = {key: value for key, value in weights.items() if not key.startswith(f"{network.base_model_prefix}.")}
    return Head(task, int(network.config.num_labels), weights=own)


def _logged(step: int, found: Reconstruction) -> None:
    """Say in the log what a step gives away, in counts."""
    count = len(found.sequences)
    logging.getLogger(__name__).warning("step %d: %s, %d texts recovered", step, found.status, count)
