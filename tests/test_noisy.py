"""Gaussian noise on every entry of an update: what is named, the matched filter, whole texts, and what drowns."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from helpers import truth

from dager_tutorial.client.defenses.clipping import length
from dager_tutorial.client.defenses.noise import Noise
from dager_tutorial.client.defenses.pruning import Pruning
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.client.step import client_update
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Budget
from dager_tutorial.server.completion.simulation import Simulator
from dager_tutorial.server.deviation import outstanding
from dager_tutorial.server.embedding_rows import noise_of, table_gradient
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.noisy.account import Account, Entry
from dager_tutorial.server.noisy.joint import Joint
from dager_tutorial.server.noisy.matched import Matched
from dager_tutorial.server.noisy.moves import exchanged_beginnings
from dager_tutorial.server.noisy.noise import Absent, Gaussian
from dager_tutorial.server.noisy.run import by_rows, noisy_search, through_noise
from dager_tutorial.server.outcome import Outcome
from dager_tutorial.status import Status
from dager_tutorial.update import Update

TEXT = "we listen to the old river and my father never knew her"


def noised(update: Update, deviation: float, seed: int = 5) -> Update:
    return replace(update, gradients=Noise(deviation)(update.gradients, torch.Generator().manual_seed(seed)))


def test_the_filter_is_the_inner_product_with_the_gradient(tiny_gpt2: LanguageModel) -> None:
    received = client_update(tiny_gpt2, [TEXT], [1])
    maps = {name: each for name, each in received.gradients.items() if each.dim() == 2}
    even = dict.fromkeys(received.gradients, 1.0)
    matched = Matched(Simulator(tiny_gpt2, received, Head(), torch.float32), received.gradients, even)
    for other, label in (("never knew the old river", 0), (TEXT, 1)):
        (ids,) = truth(tiny_gpt2, [other])
        own = client_update(tiny_gpt2, [other], [label]).gradients
        product = sum(float((maps[name].double() * own[name]).sum()) for name in maps)
        size = sum(float(own[name].double().square().sum()) for name in maps) ** 0.5
        found = matched.scores([ids])
        assert float(found.values[0]) == pytest.approx(abs(product) / size, rel=1e-4)
        if product > 0:
            assert int(found.labels[0]) == label
            assert float(found.weights[0]) == pytest.approx(product / size**2, rel=1e-4)


def test_silent_rows_measure_the_noise_and_others_name_the_tokens(tiny_gpt2: LanguageModel) -> None:
    clean = client_update(tiny_gpt2, [TEXT])
    assert noise_of(evidence_of(tiny_gpt2, clean)) is None
    evidence = evidence_of(tiny_gpt2, noised(clean, 1e-4))
    deviation = noise_of(evidence)
    assert deviation == pytest.approx(1e-4, rel=0.02)
    rows = table_gradient(evidence, evidence.adapter.first_input.tokens)
    assert rows is not None and deviation is not None
    (ids,) = truth(tiny_gpt2, [TEXT])
    assert set(outstanding(rows, deviation).tolist()) == set(ids)


def test_a_text_comes_back_through_noise_and_is_certified(tiny_gpt2: LanguageModel) -> None:
    clean = client_update(tiny_gpt2, [TEXT], [1])
    found = attack(tiny_gpt2, noised(clean, 1e-3 * length(clean.gradients) / 20))
    assert found.status is Status.CERTIFIED, found.diagnosis
    assert set(found.confirmed) == truth(tiny_gpt2, [TEXT])
    assert found.labels == ((1,),)


def test_texts_of_one_update_come_back_together_and_are_certified(tiny_gpt2: LanguageModel) -> None:
    texts = [TEXT, "cup young snow never listen to the wind"]
    clean = client_update(tiny_gpt2, texts, [1, 0])
    found = attack(tiny_gpt2, noised(clean, 1e-5 * length(clean.gradients)))
    assert found.status is Status.CERTIFIED, found.diagnosis
    assert set(found.confirmed) == truth(tiny_gpt2, texts)


def joint_of(model: LanguageModel, update: Update) -> Joint:
    evidence = evidence_of(model, update)
    simulator = Simulator(model, update, Head(), torch.float32)
    table, first = evidence.adapter.position_table or pytest.fail("positions are needed")
    rows, deviation = table_gradient(evidence, evidence.adapter.first_input.tokens), noise_of(evidence)
    assert rows is not None and deviation is not None
    account = Account(simulator, update.gradients, Gaussian.of(simulator.shared, deviation))
    words, positions = account.name_of(evidence.adapter.first_input.tokens), account.name_of(table)
    assert words is not None and positions is not None
    budget = Budget.of(AttackConfig(), time.monotonic(), None)
    return Joint(account, words, (positions, first), outstanding(rows, deviation), budget)


def test_exchanged_and_forgotten_tokens_are_put_right(tiny_gpt2: LanguageModel) -> None:
    texts = [TEXT, "cup young snow never listen to the wind"]
    clean = client_update(tiny_gpt2, texts, [1, 0])
    joint = joint_of(tiny_gpt2, noised(clean, 1e-5 * length(clean.gradients)))
    (first,), (second,) = (truth(tiny_gpt2, [text]) for text in texts)
    right = [Entry(first, 1, 0.5), Entry(second, 0, 0.5)]
    exchanged = [
        right[0]._replace(tokens=(*first[:2], second[2], *first[3:])),
        right[1]._replace(tokens=(*second[:2], first[2], *second[3:])),
    ]
    assert joint.told(right)
    assert not joint.told(exchanged)
    assert joint.mended(exchanged) == right
    assert right in exchanged_beginnings(next(exchanged_beginnings(right)))
    forgotten = [right[0]._replace(tokens=(*first[:4], first[3], *first[5:])), right[1]]
    assert {token for entry in joint.placed(forgotten) for token in entry.tokens} == set(joint.tokens.tolist())


@pytest.mark.parametrize("pruning", [Pruning(60), Pruning(5), Pruning(60, "random")], ids=lambda each: each.told)
def test_what_is_kept_of_the_embeddings_tells_all_texts(tiny_gpt2: LanguageModel, pruning: Pruning) -> None:
    texts = [TEXT, "cup young snow never listen to the wind", "the old wind"]
    clean = client_update(tiny_gpt2, texts, [1, 0, 1])
    sent = replace(clean, gradients=pruning(clean.gradients, torch.Generator().manual_seed(0)))
    evidence, budget = evidence_of(tiny_gpt2, sent), Budget.of(AttackConfig(), time.monotonic(), None)
    found = by_rows(noisy_search(tiny_gpt2, sent, Head(), evidence, budget), evidence)
    assert found is not None and found.status is Status.CERTIFIED
    assert {text.tokens for text in found.texts} == truth(tiny_gpt2, texts)
    assert sorted(text.labels for text in found.texts) == [(0,), (1,), (1,)]


def test_a_text_that_weighs_nothing_is_never_proven(tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [TEXT, "the old wind"]
    clean = client_update(tiny_gpt2, texts, [1, 0])
    sent = replace(clean, gradients=Pruning(20)(clean.gradients))
    (first,), (second,) = (truth(tiny_gpt2, [text]) for text in texts)
    right = [Entry(first, 1, 0.5), Entry(second, 0, 0.5)]
    monkeypatch.setattr(Joint, "run", lambda _: [*right, Entry(second[:2], 1, 1e-8)])
    evidence, budget = evidence_of(tiny_gpt2, sent), Budget.of(AttackConfig(), time.monotonic(), None)
    assert by_rows(noisy_search(tiny_gpt2, sent, Head(), evidence, budget), evidence) is None
    monkeypatch.setattr(Joint, "run", lambda _: right)
    assert by_rows(noisy_search(tiny_gpt2, sent, Head(), evidence, budget), evidence) is not None


def test_of_entries_that_were_sent_the_filter_takes_the_gradient_on_these(tiny_gpt2: LanguageModel) -> None:
    received = client_update(tiny_gpt2, [TEXT, "the old wind"], [1, 0])
    sent = Pruning(20)(received.gradients)
    noise = Absent.of(sent)
    kept = {name: noise.sent(each) for name, each in sent.items()}
    matched = Matched(Simulator(tiny_gpt2, received, Head(), torch.float32), sent, noise.deviations, kept)
    (ids,), own = truth(tiny_gpt2, [TEXT]), client_update(tiny_gpt2, [TEXT], [1]).gradients
    maps = [name for name, each in sent.items() if each.dim() == 2]
    there = {name: own[name].double() * (sent[name] != 0) for name in maps}
    product = sum(float((sent[name] * there[name]).sum()) for name in maps)
    square = sum(float(each.square().sum()) for each in there.values())
    assert float(matched.scores([ids]).weights[0]) == pytest.approx(product / square, rel=1e-4)


def test_an_update_that_drowns_gives_no_text(tiny_gpt2: LanguageModel) -> None:
    clean = client_update(tiny_gpt2, [TEXT, "cup young snow"], [1, 0])
    found = attack(tiny_gpt2, noised(clean, length(clean.gradients)))
    assert not found.sequences
    assert found.status is Status.NOISE


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"])
def test_nothing_false_is_confirmed_in_noise(request: pytest.FixtureRequest, name: str) -> None:
    model: LanguageModel = request.getfixturevalue(name)
    texts = [TEXT, "cup young snow never listen to the wind"]
    clean = client_update(model, texts, [1, 0])
    for share in (1e-5, 1e-4, 1e-3):
        found = attack(model, noised(clean, share * length(clean.gradients)))
        assert not set(found.confirmed) - truth(model, texts)


@pytest.mark.parametrize("stochastic", [False, True])
def test_texts_come_back_from_a_grid_by_their_embeddings_alone(tiny_gpt2: LanguageModel, stochastic: bool) -> None:
    texts = ["cup young snow", "we listen to the old river"]
    clean = client_update(tiny_gpt2, texts, [1, 0])
    rounded = Rounding("int8", stochastic)(clean.gradients, torch.Generator().manual_seed(5))
    update = replace(clean, gradients=rounded)
    nothing = Outcome(Status.PARTIAL, "nothing was found", ())
    budget = Budget.of(AttackConfig(), time.monotonic(), None)
    evidence = evidence_of(tiny_gpt2, update)
    search = noisy_search(tiny_gpt2, update, None, evidence, budget)
    found = through_noise(search, evidence, nothing, budget)
    assert found.status is Status.CERTIFIED, found.diagnosis
    assert {text.tokens for text in found.texts} == truth(tiny_gpt2, texts)
