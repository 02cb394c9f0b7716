"""The certificate behind clipping: one unknown factor, or one for each tensor, and nothing false behind it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers import WORDS, every

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defenses.chain import protected
from dager_tutorial.client.defenses.clipping import SCOPES, Clipping, length
from dager_tutorial.client.defenses.pruning import Pruning
from dager_tutorial.client.step import client_update, head_of
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.completion.ledger import Ledger
from dager_tutorial.server.completion.scaled import behind_scale
from dager_tutorial.server.completion.simulation import Simulator
from dager_tutorial.server.completion.tokens import with_targets
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.outcome import FoundText, Outcome
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.stopwatch import Stopwatch
from dager_tutorial.update import Update

FAMILIES = ("shaken_gpt2", "tiny_llama", "tiny_bert", "tiny_distilbert", "tiny_roberta")
TASKS = [
    *((family, "classification") for family in FAMILIES),
    *((family, "next_token") for family in ("shaken_gpt2", "tiny_llama")),
    *((family, "masked") for family in ("tiny_masked_bert", "tiny_roberta")),
]
ON_TASKS = pytest.mark.parametrize(("model", "task"), TASKS, indirect=["model"])


def drawn(seed: int, count: int) -> list[str]:
    """Texts of three to eight words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randrange(3, 9))) for _ in range(count)]


def claimed(model: LanguageModel, texts: list[str], wholes: bool) -> Outcome:
    """What a search would say that takes these texts for all that there are."""
    ids = [tuple(model.tokenizer(text)["input_ids"]) for text in dict.fromkeys(texts)]
    whole = Confirmation(Certainty.WHOLE)
    return Outcome(
        Status.TEXTS_COMPLETE, "", tuple(FoundText(each if wholes else each[:-1], 1.0, whole) for each in ids)
    )


@ON_TASKS
@pytest.mark.parametrize("scope", SCOPES)
def test_a_clipped_update_is_certified_as_the_whole_one_is(model: LanguageModel, task: str, scope: str) -> None:
    config = ClientConfig(task=task)
    labels = [0, 1, 0] if task == "classification" else None
    update = client_update(model, drawn(0, 3), labels, config=config)
    clipped, _ = protected(update, [Clipping(1e-2 * length(update.gradients), scope)])
    plain, behind = (attack(model, one, head=head_of(config)) for one in (update, clipped))
    assert (plain.status, behind.status) == (Status.CERTIFIED, Status.CERTIFIED), behind.diagnosis
    assert set(zip(behind.sequences, behind.labels, behind.copies, strict=True)) == set(
        zip(plain.sequences, plain.labels, plain.copies, strict=True)
    )
    assert behind.batch_size == plain.batch_size and "clipped" in behind.diagnosis


@every("shaken_gpt2", "tiny_bert")
def test_copies_come_back_and_of_one_text_no_label(model: LanguageModel) -> None:
    texts = [*drawn(5, 2), drawn(5, 2)[0]]
    update, _ = protected(client_update(model, texts, [1, 0, 1]), [Clipping(1e-3)])
    found = attack(model, update)
    assert (found.status, found.batch_size) == (Status.CERTIFIED, 3)
    assert sorted(found.labels) == [(0,), (1, 1)]
    alone, _ = protected(client_update(model, texts[:1], [1]), [Clipping(1e-3)])
    found = attack(model, alone)
    assert (found.status, found.batch_size, found.labels) == (Status.CERTIFIED, None, ((),))
    pruned, _ = protected(client_update(model, texts[:1], [1]), [Clipping(1e-3), Pruning(50)])
    assert attack(model, pruned).texts == (texts[0],)


@ON_TASKS
@pytest.mark.parametrize("missing", ["text", "token", "copy"])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_missing_no_factor_hides(model: LanguageModel, task: str, missing: str, scope: str) -> None:
    config = ClientConfig(task=task)
    for seed in range(2):
        texts = drawn(seed, 4)
        sent = [*texts, texts[0]] if missing == "copy" else texts
        # a copy with the other label: not a multiple of what the text adds once
        labels = [0, 1, 1, 0, 1][: len(sent)] if task == "classification" else None
        update = client_update(model, sent, labels, config=config)
        clipped, _ = protected(update, [Clipping(1e-2 * length(update.gradients), scope)])
        said = {"text": texts[1:], "token": [*texts[:3], f"the {texts[3]}"], "copy": texts}[missing]
        outcome = claimed(model, said, task != "next_token")
        found = completed_of(model, clipped, config, outcome)
        if missing == "copy" and task == "next_token":  # counted, not claimed
            assert found is not None and found.size == 5
        else:
            assert found is None


def completed_of(model: LanguageModel, update: Update, config: ClientConfig, outcome: Outcome) -> Outcome | None:
    """What completion makes of texts that are said to be all."""
    simulator = Simulator(model, update, head_of(config), torch.float32)
    if config.task != "classification":
        return with_targets(simulator, update.gradients, outcome, torch.float32)
    ledger = Ledger(simulator, evidence_of(model, update, Stopwatch()), update.gradients)
    found = behind_scale(ledger, outcome)
    assert behind_scale(ledger, replace(outcome, status=Status.PARTIAL)) is None
    return found


@every("shaken_gpt2")
def test_a_reversed_update_is_not_certified(model: LanguageModel) -> None:
    update = client_update(model, drawn(0, 3), [0, 1, 1])
    reversed_ = Update({name: -0.5 * tensor for name, tensor in update.gradients.items()})
    found = attack(model, reversed_)
    assert found.status is not Status.CERTIFIED or sorted(found.labels) != [(0,), (1,), (1,)]
