"""A head that nobody told: found with its numbers of classes, found up to a swap, or not found and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from helpers import every
from torch import Tensor

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import MLP_OUTPUT
from dager_tutorial.server.completion.classifier import class_map_of, views_of
from dager_tutorial.server.completion.head import find_head
from dager_tutorial.server.completion.simulation import Simulator, of_logits
from dager_tutorial.update import Update


@dataclass(frozen=True)
class Played:
    """A client's step, and what it was made of."""

    update: Update
    texts: list[tuple[int, ...]]
    rows: Tensor  # of the true map to the classes, centred
    names: tuple[str, str | None]

    def without_its_gradient(self) -> Update:
        """The update as if the map's own gradient had not been shared."""
        return Update({name: each for name, each in self.update.gradients.items() if name not in self.names})


def played(model: LanguageModel, texts: Sequence[str], labels: Sequence[int], **options) -> Played:
    """Play a client whose head has another seed than any that the server would guess."""
    config = ClientConfig(seed=5, head_std=options.pop("head_std", 0.02), **options)
    update, truth = play(model, texts, labels, config=config)
    head = Head(classes=max(2, max(labels) + 1), seed=5, std=config.head_std)
    simulator = Simulator(model, update, head, torch.float32)
    mapped = class_map_of(simulator)
    rows = mapped.module.weight.detach().double()
    return Played(update, list(truth.sequences), rows - rows.mean(0), (mapped.weight, mapped.bias))


def angle(found: Tensor, rows: Tensor) -> float:
    """One less the cosine between two maps."""
    return 1 - ((found * rows).sum() / found.norm() / rows.norm()).item()


@every("tiny_gpt2", "shaken_gpt2", "tiny_llama", "tiny_bert", "shaken_bert")
@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1], [2, 0, 1, 1, 0], [3, 1, 0, 2, 0]])
def test_its_own_gradient_gives_a_head_of_any_number_of_classes(model, labels, random_texts):
    case = played(model, random_texts(5, 1), labels)
    found = find_head(model, case.update, case.texts, torch.float32)
    assert found.head is not None, found.reason
    assert found.numbered and found.unexplained < 1e-5
    assert angle(found.head.weights[case.names[0]], case.rows) < 1e-6
    assert found.counts.labels.argmax(1).tolist() == labels and found.counts.complete


@every("tiny_gpt2", "shaken_gpt2", "tiny_llama", "tiny_bert", "shaken_bert")
def test_two_classes_are_found_without_it_up_to_a_swap(model, random_texts):
    labels = [0, 1, 1, 0, 1, 1]
    case = played(model, random_texts(6, 2), labels)
    found = find_head(model, case.without_its_gradient(), case.texts, torch.float32)
    assert found.head is not None, found.reason
    assert not found.numbered and found.unexplained < 2e-5
    rows = found.head.weights[case.names[0]]
    swapped = (rows * case.rows).sum() < 0
    assert angle(-rows if swapped else rows, case.rows) < 1e-6
    assert found.counts.labels.argmax(1).tolist() == [label ^ int(swapped) for label in labels]


@every("tiny_gpt2", "tiny_bert")
@pytest.mark.parametrize("shared", [True, False])
def test_texts_that_occur_twice_and_with_both_labels_count(model, shared, random_texts):
    a, b, c, d = random_texts(4, 3)
    case = played(model, [a, a, b, c, c, d], [0, 0, 1, 0, 1, 1])
    found = find_head(model, case.update if shared else case.without_its_gradient(), case.texts, torch.float32)
    assert found.head is not None, found.reason
    wanted = [[2, 0], [0, 1], [1, 1], [0, 1]]
    assert found.counts.size == 6
    assert found.counts.labels.tolist() in ([wanted] if shared else [wanted, [each[::-1] for each in wanted]])


@every("shaken_gpt2", "tiny_bert", "tiny_llama")
@pytest.mark.parametrize("shared", [True, False])
def test_a_missing_text_is_noticed(model, shared, random_texts):
    case = played(model, random_texts(5, 4), [0, 1, 1, 0, 1])
    found = find_head(model, case.update if shared else case.without_its_gradient(), case.texts[1:], torch.float32)
    assert found.head is None and "missing" in found.reason


@every("tiny_gpt2", "tiny_bert")
def test_three_classes_without_their_gradient_are_not_taken_for_two(model, random_texts):
    case = played(model, random_texts(6, 5), [0, 1, 2, 0, 1, 2])
    found = find_head(model, case.without_its_gradient(), case.texts, torch.float32)
    assert found.head is None and found.reason


@every("tiny_distilbert", "tiny_roberta")
def test_a_head_with_a_layer_of_its_own_is_refused(model, random_texts):
    config = ClientConfig(seed=5)
    update, truth = play(model, random_texts(3, 6), [0, 1, 0], config=config)
    found = find_head(model, update, list(truth.sequences), torch.float32)
    assert found.head is None and "layer" in found.reason


@every("shaken_gpt2", "tiny_llama", "shaken_bert")
def test_slopes_are_derivatives(model, random_texts):
    case = played(model, random_texts(2, 7), [0, 1])
    simulator = Simulator(model, case.update, Head(), torch.float32)
    mapped = class_map_of(simulator)
    views = views_of(simulator, case.texts, mapped.module)
    tap = simulator.adapter.tap(simulator.adapter.num_blocks - 1, MLP_OUTPUT)
    factors = simulator.factors(case.texts, tap)
    rows = mapped.module.weight.detach()
    torch.testing.assert_close(rows @ views.slopes, factors.slopes.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(views.inputs, factors.inputs)


@every("shaken_gpt2", "shaken_bert")
@pytest.mark.parametrize("shared", [True, False])
def test_offsets_of_a_trained_head_are_found_too(model, shared, random_texts):
    """A bias of the head, or of a last norm whose own gradient was not shared."""
    case = played(model, random_texts(6, 8), [0, 1, 1, 0, 1, 1], head_std=0.3)
    simulator = Simulator(model, case.update, Head(seed=5, std=0.3), torch.float32)
    if case.names[1]:
        simulator.network.get_parameter(case.names[1]).data = torch.tensor([0.2, -0.2])
    logits, _ = simulator.logits(case.texts)
    chances = logits.detach().double().softmax(1)
    labels = torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0, 1, 1]]
    gradients = {name: torch.zeros(each.shape) for name, each in simulator.shared.items()}
    simulator.subtract(gradients, case.texts, of_logits((labels - chances) / 6))
    kept = {name: each for name, each in gradients.items() if "ln_f" not in name and (shared or name not in case.names)}
    found = find_head(model, Update(kept), case.texts, torch.float32)
    assert found.head is not None, found.reason
    assert found.unexplained < 2e-5
    assert found.counts.labels.argmax(1).tolist() in ([0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0][: 6 * (not shared)])
