"""Counts behind gradients in logits: whole numbers found, or nothing claimed."""

from __future__ import annotations

import pytest
import torch
from helpers import every
from torch import Tensor

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.models.heads import Head
from dager_tutorial.models.tap import ATTENTION_OUTPUT
from dager_tutorial.server.completion.counting import Counts, count
from dager_tutorial.server.completion.reduction import reduction_of, shares, shares_of_all
from dager_tutorial.server.completion.simulation import Simulator

BATCHES = {  # text and label of each
    "once each": ([0, 1, 2, 3, 4], [0, 1, 1, 0, 1]),
    "twice and three times, equal labels": ([0, 1, 2, 0, 1, 1], [0, 1, 1, 0, 1, 1]),
    "both labels of one text": ([0, 1, 2, 3, 3], [0, 1, 1, 0, 1]),
    "two to one, one to two": ([0, 0, 0, 1, 1, 1, 2, 3], [0, 0, 1, 1, 0, 1, 1, 0]),
    "three classes": ([0, 1, 2, 3, 4], [2, 0, 1, 1, 0]),
    "three classes, all of one text": ([0, 0, 0, 1, 2, 3, 3], [0, 1, 2, 0, 1, 2, 2]),
    "four classes": ([0, 1, 2, 3, 4, 0], [3, 1, 0, 2, 0, 1]),
}


def counted(model, texts, labels, *, together=False, **options) -> tuple[Counts | None, Tensor]:
    """What is counted of a batch, text by text or together, and the truth."""
    config = ClientConfig(**options)
    update, truth = play(model, texts, labels, config=config)
    classes, dtype = max(2, max(labels) + 1), getattr(torch, config.dtype)
    simulator = Simulator(model, update, Head(classes=classes, std=config.head_std), dtype)
    distinct = list(dict.fromkeys(truth.sequences))
    wanted = torch.zeros(len(distinct), classes, dtype=torch.long)
    for sequence, label in zip(truth.sequences, labels, strict=True):
        wanted[distinct.index(sequence), label] += 1
    adapter = simulator.adapter
    tap = adapter.tap(adapter.num_blocks - 1, ATTENTION_OUTPUT)
    gradient = tap.gradient(update.for_backbone(model.network))
    factors = simulator.factors(distinct, tap)
    if together:
        all_of_them = shares_of_all(gradient, factors, torch.finfo(dtype).eps)
        return count(all_of_them, factors.chances, least=len(distinct)), wanted
    reduction = reduction_of(gradient, torch.finfo(dtype).eps)
    return count(shares(reduction, factors).gradients, factors.chances, least=reduction.least), wanted


@every("tiny_gpt2", "shaken_gpt2", "tiny_llama", "tiny_bert", "shaken_bert")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("head_std", [1e-3, 0.05])
@pytest.mark.parametrize("together", [False, True])
def test_labels_and_copies_of_every_kind_of_batch(model, batch, head_std, together, random_texts):
    places, labels = BATCHES[batch]
    texts = random_texts(5, 11, longest=8)
    found, wanted = counted(model, [texts[place] for place in places], labels, together=together, head_std=head_std)
    assert found is not None and found.complete and found.size == len(places)
    assert found.labels.tolist() == wanted.tolist()


@every("tiny_gpt2", "tiny_bert", "tiny_llama")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("together", [False, True])
def test_in_bfloat16_counts_are_right_or_not_complete(model, batch, together, random_texts):
    places, labels = BATCHES[batch]
    texts = random_texts(5, 11, longest=8)
    options = {"together": together, "dtype": "bfloat16", "head_std": 0.05}
    found, wanted = counted(model, [texts[place] for place in places], labels, **options)
    assert found is None or not found.complete or found.labels.tolist() == wanted.tolist()


def exact(labels: Tensor, chances: Tensor, size: int) -> Tensor:
    return (labels.sum(1, keepdim=True) * chances - labels) / size


def test_one_of_each_class_more_is_told_from_how_little_it_adds():
    chances = torch.tensor([[0.5001, 0.4999], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64)
    labels = torch.tensor([[2, 1], [0, 1], [1, 0]])
    assert count(exact(labels, chances, 5), chances, least=3).labels.tolist() == labels.tolist()


def test_what_must_add_up_tells_when_it_adds_nothing():
    chances = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64)
    labels = torch.tensor([[2, 1], [0, 1], [1, 0]])
    assert count(exact(labels, chances, 5), chances, least=3).labels.tolist() == labels.tolist()
    assert not count(exact(labels, chances, 5), chances, least=4).complete  # a text is missing: it may be that one


def test_nothing_is_claimed_where_two_texts_may_be_meant():
    chances = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.3, 0.7]], dtype=torch.float64)
    labels = torch.tensor([[2, 1], [0, 1], [1, 0]])
    found = count(exact(labels, chances, 5), chances, least=3)
    assert found.size == 5 and not found.complete


def test_noise_taken_for_texts_does_not_double_the_batch():
    chances = torch.full((3, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([[1, 0], [0, 1], [0, 1]])
    found = count(exact(labels, chances, 3), chances, least=6)
    assert found.size == 3 and found.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_whole_is_not_counted(seed):
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(1)
    noise = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    assert count((noise - noise.mean(1, keepdim=True)) / 10, chances, least=6) is None
