"""A second opinion: does a reconstruction, whoever made it, explain the update? (chapter `09_completion`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dager_tutorial.errors import DagerError
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.completion.counting import Counts
from dager_tutorial.server.completion.remainder import remainder_of
from dager_tutorial.server.completion.simulation import Ids, Simulator, of_logits
from dager_tutorial.server.completion.targets import TargetCounts, objective_of
from dager_tutorial.update import Update


def unexplained_share(
    model: LanguageModel,
    update: Update,
    texts: Sequence[Ids],
    labels: Sequence[tuple[int, ...]] | None = None,
    copies: Sequence[int] | None = None,
    *,
    head: Head | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Simulate a client's step on a batch and compare it with an update, over all shared parameters.

    Args:
        model: The model both sides know.
        update: What the client sent.
        texts: Token ids of the distinct texts; under the next-token loss with their last tokens.
        labels: Of a classification: for each text its labels, one a copy.
        copies: Of a next-token loss: how often each text occurs; once each where None.
        head: The head that the server handed out; freshly drawn, for two classes or the next token, where None.
        dtype: The client's precision.

    Returns:
        The norm of what is left over the norm of the update: about 1e-7 in float32 where all is right, and 1 where
        nothing is.

    Raises:
        DagerError: There is not one entry to each text, or no text at all.
    """
    copies = copies if copies is not None else [1] * len(texts)
    said = len(copies) if labels is None else len(labels)
    if not texts or said != len(texts):
        raise DagerError(f"there are {len(texts)} texts and {said} labels or copies: give one entry a text")
    head = head or (Head("next_token") if labels is None else Head(classes=max(2, max(map(max, labels)) + 1)))
    simulator = Simulator(model, update, head, dtype)
    if labels is not None:
        objective = of_logits(_gradients(simulator, texts, labels))
    else:
        predicted = sum((len(text) - 1) * n for text, n in zip(texts, copies, strict=True))
        objective = objective_of(TargetCounts(tuple(texts), tuple(copies), (), predicted, 0))
    return remainder_of(simulator, update.gradients, texts, objective).share


def _gradients(simulator: Simulator, texts: Sequence[Ids], labels: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """What the cross-entropy has as gradient in the logits of texts with these labels."""
    classes = simulator.head.classes
    counted = torch.stack([torch.tensor(each).bincount(minlength=classes) for each in labels])
    return Counts(int(counted.sum()), counted, simulator.chances(texts)).gradients
