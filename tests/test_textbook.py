"""The textbook attack: exact on small cases, each stage against its definition, and its limits."""

import pytest
import torch

from dager_tutorial.client.step import client_update, encode
from dager_tutorial.errors import DagerError, UpdateError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.tap import QKV, QUERY
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.textbook.decoder import (
    LONGEST_REPEAT,
    second_block_inputs,
    span_distance,
    textbook_attack,
    textbook_decoder_search,
    textbook_span,
    textbook_token_filter,
)
from dager_tutorial.update import Update

TEXTS = ["the old man walks to the sea", "we had good tea", "a cat saw the old dog sleep"]


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "tiny_llama_bos"])
def model(request) -> LanguageModel:
    return request.getfixturevalue(request.param)


def truth(model: LanguageModel, texts: list[str]) -> set[tuple[int, ...]]:
    return set(map(tuple, encode(model.tokenizer, texts)))


def gradient(model: LanguageModel, texts: list[str], block: int, kind: str) -> torch.Tensor:
    update = client_update(model, texts)
    return adapter_for(model.network).tap(block, kind).gradient(update.for_backbone(model.network))


@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_every_text_comes_back_exactly(model, task):
    found = textbook_attack(model, client_update(model, TEXTS, task=task))
    expected = truth(model, TEXTS)
    if task == "next_token":
        expected = {ids[:-1] for ids in expected}
    assert set(found.sequences) == expected
    assert len(found.sequences) == len(expected)
    assert found.status == "exact", found.diagnosis
    assert all(0 <= score < 1 for score in found.scores)


def test_random_batches_come_back_exactly(model, random_texts):
    for seed in range(3):
        texts = random_texts(4, seed)
        assert set(textbook_attack(model, client_update(model, texts)).sequences) == truth(model, texts)


def test_a_text_of_one_token_and_duplicates_are_found_once(model):
    texts = ["tea", "we had good tea", "we had good tea"]
    labels = [0, 1, 1]  # with a fresh head, equal texts of opposite labels would cancel each other
    found = textbook_attack(model, client_update(model, texts, labels))
    assert sorted(found.sequences) == sorted(truth(model, texts))


def test_a_text_that_begins_another_is_not_seen(model):
    found = textbook_attack(model, client_update(model, ["the old man", "the old man walks"]))
    assert set(found.sequences) == truth(model, ["the old man walks"])
    assert found.status == "exact"  # all rows are explained; where texts end the rows do not say


def test_span_is_the_row_space_of_the_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(*shape, generator=generator) for shape in ((7, 40), (60, 7)))
    basis = textbook_span(outputs @ inputs)
    assert basis.shape == (40, 7)
    assert torch.allclose(basis.T @ basis, torch.eye(7), atol=1e-5)
    assert span_distance(inputs, basis).max() < 1e-5
    others = torch.randn(1000, 40, generator=generator)
    # A random vector keeps (40 - 7) / 40 of its energy on average (Theorem 5.2: never nothing).
    assert span_distance(others, basis).square().mean() == pytest.approx(33 / 40, abs=0.01)
    assert span_distance(5 * others, basis).allclose(span_distance(others, basis))
    assert textbook_span(outputs @ inputs, rank_tolerance=1e9).shape == (40, 0)


def test_a_zero_vector_lies_in_no_span():
    assert not span_distance(torch.zeros(1, 3), torch.eye(3)[:, :1]) < 1


def test_the_network_is_stopped_at_what_it_would_compute(model):
    adapter = adapter_for(model.network)
    ids = torch.randint(5, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    tap = adapter.tap(1, QKV)
    assert torch.equal(second_block_inputs(adapter, ids), adapter.tap_inputs(ids, torch.ones_like(ids), [tap])[tap])
    assert model.network(input_ids=ids).last_hidden_state.shape == (3, 6, 64)  # no hook is left behind


def test_filter_keeps_the_true_tokens_of_each_position_and_stops_after_the_last(tiny_gpt2):
    candidates = textbook_token_filter(
        adapter_for(tiny_gpt2.network), textbook_span(gradient(tiny_gpt2, TEXTS, 0, QKV))
    )
    sequences = encode(tiny_gpt2.tokenizer, TEXTS)
    assert len(candidates) == max(map(len, sequences))
    for position, tokens in enumerate(candidates):
        assert {ids[position] for ids in sequences if position < len(ids)} <= set(tokens.tolist())
        assert len(tokens) < 30  # a word-level vocabulary of hundreds: the filter filters


def test_the_query_gradient_alone_does_not_see_first_tokens(tiny_gpt2, tiny_llama):
    absolute = textbook_token_filter(
        adapter_for(tiny_gpt2.network), textbook_span(gradient(tiny_gpt2, TEXTS, 0, QUERY))
    )
    assert absolute == []  # position 0 is empty
    rotary = textbook_token_filter(
        adapter_for(tiny_llama.network), textbook_span(gradient(tiny_llama, TEXTS, 0, QUERY))
    )
    sequences = encode(tiny_llama.tokenizer, TEXTS)
    later = {token for ids in sequences for token in ids[1:]}
    assert set(rotary[0].tolist()) == later
    assert later < {token for ids in sequences for token in ids}


def test_repeated_first_tokens_end(tiny_llama):
    texts = ["very very good tea", "we had good tea"]
    found = textbook_attack(tiny_llama, client_update(tiny_llama, texts))
    assert set(found.sequences) == truth(tiny_llama, texts)
    adapter = adapter_for(tiny_llama.network)
    token = torch.tensor(encode(tiny_llama.tokenizer, ["very"])[0])
    basis = textbook_span(gradient(tiny_llama, texts, 1, QKV))
    chain = textbook_decoder_search(adapter, basis, [token] * adapter.max_positions)
    assert sorted(map(len, chain)) == list(range(1, LONGEST_REPEAT + 1))


def test_progress_tells_the_stages(tiny_gpt2):
    calls = []
    textbook_attack(tiny_gpt2, client_update(tiny_gpt2, TEXTS), progress=lambda *call: calls.append(call))
    longest = max(len(ids) for ids in truth(tiny_gpt2, TEXTS))
    assert [call for call in calls if call[0] == "filter"] == [("filter", n + 1, None) for n in range(longest)]
    assert calls[-1] == (
        "search",
        len({ids[:n] for ids in truth(tiny_gpt2, TEXTS) for n in range(1, 8)}),
        None,
    )


def test_updates_without_an_answer_have_a_status(model, random_texts):
    update = client_update(model, TEXTS)
    names = adapter_for(model.network).tap(1, QKV).parameters
    part = {key: value for key, value in update.gradients.items() if not key.endswith(names)}
    zero = {key: torch.zeros_like(value) for key, value in update.gradients.items()}
    noise = {key: torch.randn_like(value) for key, value in update.gradients.items()}
    for gradients, status in ((part, "no_signal"), (zero, "no_signal"), (noise, "saturated")):
        found = textbook_attack(model, Update(gradients))
        assert (found.status, found.sequences) == (status, ())
    strict = textbook_attack(model, update, span_threshold_0=1e-12)
    assert (strict.status, strict.sequences) == ("no_candidates", ())
    long = client_update(model, random_texts(12, 0, 9, 9))
    assert textbook_attack(model, long).status == "saturated"


def test_mistakes_have_one_line(tiny_gpt2, tiny_llama, tiny_bert):
    with pytest.raises(DagerError, match="encoder"):
        textbook_attack(tiny_bert, client_update(tiny_bert, TEXTS))
    with pytest.raises(UpdateError):
        textbook_attack(tiny_llama, client_update(tiny_gpt2, TEXTS))
