"""Completion: labels, counts, whole texts and the proof, on every family; and what must never be certified."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import WORDS, every

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update, head_of, play
from dager_tutorial.evaluation.metrics import score
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.server.completion.certificate import unexplained_share
from dager_tutorial.server.constants import constants
from dager_tutorial.status import Status
from dager_tutorial.update import Update

ALL = ("shaken_gpt2", "tiny_llama", "tiny_bert", "tiny_distilbert", "tiny_roberta")
TEXTS = ["the dog is good", "a cat and the animal", "the boy had no idea", "the dog is good"]


def labels_of(found) -> dict[tuple[int, ...], tuple[int, ...]]:
    return dict(zip(found.sequences, found.labels, strict=True))


@every(*ALL)
@pytest.mark.parametrize("share", ["all", "attention"])
@pytest.mark.parametrize("labels", [[0, 1, 1, 1], [2, 0, 1, 2]], ids=str)
def test_labels_copies_and_size_come_back(model: LanguageModel, labels: list[int], share: str) -> None:
    config = ClientConfig(share=share, seed=3)
    update, kept = play(model, TEXTS, labels, config=config)
    found = attack(model, update, head=head_of(config, labels))
    assert (found.status, found.batch_size) == (Status.CERTIFIED, 4), found.diagnosis
    wanted: dict[tuple[int, ...], list[int]] = {}
    for ids, label in zip(kept.sequences, labels, strict=True):
        wanted.setdefault(ids, []).append(label)
    assert labels_of(found) == {ids: tuple(sorted(those)) for ids, those in wanted.items()}
    points = score(found, kept)
    assert (points.exact, points.counted, points.labelled) == (1, 1, 1)


@every("shaken_gpt2", "tiny_llama")
def test_whole_texts_come_back_from_the_next_token_loss(model: LanguageModel) -> None:
    texts = [*TEXTS, "the dog", "the dog is good and old", "a"]
    update, kept = play(model, texts, config=ClientConfig(task="next_token"))
    found = attack(model, update)
    assert (found.status, found.with_targets) == (Status.CERTIFIED, True), found.diagnosis
    assert set(found.sequences) == set(kept.wholes) - {()}
    assert score(found, kept).exact == 1


@every("tiny_masked_bert", "tiny_distilbert", "tiny_roberta")
def test_what_masks_hid_comes_back(model: LanguageModel) -> None:
    config = ClientConfig(task="masked")
    update, kept = play(model, TEXTS[:3], config=config)
    found = attack(model, update, head=head_of(config))
    assert (found.status, found.with_targets) == (Status.CERTIFIED, True), found.diagnosis
    assert set(found.sequences) == set(kept.wholes)


def mutants(found, vocabulary: int, chance: random.Random, count: int):
    """Reconstructions that are wrong in one token, one label or one count."""
    for _ in range(count):
        texts, labels = list(map(list, found.sequences)), list(found.labels)
        place = chance.randrange(len(texts))
        kind = chance.choice(["token", "label", "count"])
        if kind == "token":
            at = chance.randrange(len(texts[place]))
            texts[place][at] = (texts[place][at] + chance.randrange(1, vocabulary)) % vocabulary
        elif kind == "label":
            labels[place] = (1 - labels[place][0], *labels[place][1:])
        else:
            labels[place] = (*labels[place], labels[place][0])
        yield list(map(tuple, texts)), labels


@every("shaken_gpt2", "tiny_llama", "tiny_bert")
def test_no_reconstruction_with_one_mistake_is_certified(model: LanguageModel) -> None:
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(3, 9))) for _ in range(6)]
    update = client_update(model, texts, [0, 1, 1, 0, 0, 1])
    found = attack(model, update)
    assert unexplained_share(model, update, found.sequences, found.labels) < constants().certified / 10
    for wrong, labels in mutants(found, model.network.config.vocab_size, chance, 40):
        assert unexplained_share(model, update, wrong, labels) > 10 * constants().certified


@every("shaken_gpt2", "tiny_bert")
def test_a_changed_update_is_not_certified(model: LanguageModel) -> None:
    update = client_update(model, TEXTS)
    for name, tensor in update.gradients.items():
        if tensor.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            changed = Update(update.gradients | {name: tensor + 0.01 * tensor.norm() * torch.eye(*tensor.shape)})
            found = attack(model, changed, config=AttackConfig(time_budget=20))
            assert found.status != Status.CERTIFIED
            break


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("shaken_gpt2", "classification"),
        ("tiny_bert", "classification"),
        ("shaken_gpt2", "next_token"),
        ("tiny_llama", "next_token"),
        ("tiny_masked_bert", "masked"),
    ],
    indirect=["model"],
)
@pytest.mark.parametrize("factor", [0.5, 0.37])
def test_a_scaled_update_is_certified_only_if_all_of_it_is_true(model: LanguageModel, task: str, factor: float) -> None:
    config = ClientConfig(task=task)
    update, kept = play(model, TEXTS, config=config)
    scaled = Update({name: factor * tensor for name, tensor in update.gradients.items()})
    found = attack(model, scaled, head=head_of(config))
    # A text with two labels is explained by no whole number of one label: the factor could not be told.
    assert (found.status is Status.CERTIFIED) == (task == "next_token")
    if found.status is Status.CERTIFIED:
        points = score(found, kept)
        assert (points.exact, points.counted) == (1, 1)


@every("tiny_llama")
def test_a_repeated_first_token_is_not_certified(model: LanguageModel) -> None:
    update = client_update(model, ["dog dog cat"], config=ClientConfig(task="next_token"))
    found = attack(model, update)
    true = tuple(model.tokenizer("dog dog cat")["input_ids"])
    assert found.status != Status.CERTIFIED or found.sequences == (true,)


@every("shaken_gpt2", "tiny_bert")
def test_without_completion_nothing_is_claimed(model: LanguageModel) -> None:
    found = attack(model, client_update(model, TEXTS), config=AttackConfig(complete=False))
    assert found.status == Status.TEXTS_COMPLETE
    assert not any(found.labels) and found.batch_size is None and found.unexplained is None


@every("shaken_gpt2", "tiny_llama")
def test_another_task_is_not_taken_for_the_clients(model: LanguageModel) -> None:
    update = client_update(model, TEXTS, config=ClientConfig(task="next_token"))
    found = attack(model, update, head=Head())
    assert not any(found.labels) and found.status != Status.CERTIFIED
