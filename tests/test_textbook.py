"""The textbook attack: exact on small cases, each stage against its definition, and its limits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_exact, every, truth
from torch import Tensor

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError, UpdateError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV, QUERY
from dager_tutorial.status import Certainty, Status
from dager_tutorial.textbook.block_inputs import second_block_inputs
from dager_tutorial.textbook.decoder import REPEATS_FOLLOWED, textbook_attack, textbook_decoder_search
from dager_tutorial.textbook.spans import span_distance, textbook_span
from dager_tutorial.textbook.token_filter import textbook_token_filter
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
TEXTS = ["the old man walks to the sea", "we had good tea", "a cat saw the old dog sleep"]
ALL = ["tiny_gpt2", "tiny_llama", "tiny_llama_bos"]


def gradient(model: LanguageModel, texts: list[str], block: int, kind: str) -> Tensor:
    update = client_update(model, texts)
    found = adapter_for(model.network).tap(block, kind).gradient(update.for_backbone(model.network))
    assert found is not None
    return found


def candidates_of(model: LanguageModel, texts: list[str], kind: str) -> list[Tensor]:
    """What the filter lets through where the gradient of `kind` alone is read."""
    return textbook_token_filter(adapter_for(model.network), textbook_span(gradient(model, texts, 0, kind)))


@every(*ALL)
@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_every_text_comes_back_exactly(model: LanguageModel, task: str, random_texts: Draw) -> None:
    adapter = adapter_for(model.network)
    for texts in (TEXTS, random_texts(4, 0), random_texts(4, 1), random_texts(4, 2)):
        found = textbook_attack(model, client_update(model, texts, config=ClientConfig(task=task)))
        assert_exact(found, truth(model, texts, task), Status.ROWS_COMPLETE)
        assert all(0 <= score < 1 for score in found.scores)
        taps = adapter.tap(0, QKV), adapter.tap(1, QKV)
        assert {(one.certainty, one.taps) for one in found.confirmations} == {(Certainty.ROWS, taps)}
        rows = {ids[:end] for ids in found.sequences for end in range(1, len(ids) + 1)}
        assert found.ranks[taps[1]] == len(rows)


@every("tiny_gpt2", "tiny_llama")
def test_a_prefix_counts_as_its_farthest_row(model: LanguageModel) -> None:
    """With half of a span every row of a text is somewhere between in and out."""
    adapter, ids = adapter_for(model.network), max(truth(model, TEXTS))
    assert isinstance(adapter, DecoderAdapter)
    half = textbook_span(gradient(model, TEXTS, 1, QKV))[:, ::2].contiguous()
    found = textbook_decoder_search(adapter, half, [torch.tensor([token]) for token in ids], threshold=2.0)
    rows = span_distance(second_block_inputs(adapter, torch.tensor([ids]))[0], half).tolist()
    wanted = {ids[: end + 1]: max(rows[: end + 1]) for end in range(len(ids))}
    assert found == pytest.approx(wanted, rel=1e-4)
    assert rows != sorted(rows)  # some row is nearer than one before it


@every(*ALL)
def test_a_text_of_one_token_and_duplicates_are_found_once(model: LanguageModel) -> None:
    texts = ["tea", "we had good tea", "we had good tea"]
    labels = [0, 1, 1]  # with a fresh head, equal texts of opposite labels would cancel each other
    assert_exact(textbook_attack(model, client_update(model, texts, labels)), truth(model, texts))


@every(*ALL)
def test_a_text_that_begins_another_is_not_seen(model: LanguageModel) -> None:
    found = textbook_attack(model, client_update(model, ["the old man", "the old man walks"]))
    # All rows are explained; where texts end the rows do not say.
    assert_exact(found, truth(model, ["the old man walks"]), Status.ROWS_COMPLETE)


def test_span_is_the_row_space_of_the_inputs() -> None:
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


def test_a_zero_vector_lies_in_no_span() -> None:
    assert not span_distance(torch.zeros(1, 3), torch.eye(3)[:, :1]) < 1


@every(*ALL)
def test_the_network_is_stopped_at_what_it_would_compute(model: LanguageModel) -> None:
    adapter = adapter_for(model.network)
    ids = torch.randint(5, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    tap = adapter.tap(1, QKV)
    assert torch.equal(second_block_inputs(adapter, ids), adapter.tap_inputs(ids, torch.ones_like(ids), [tap])[tap])
    assert model.network(input_ids=ids).last_hidden_state.shape == (3, 6, 64)  # no hook is left behind


def test_filter_keeps_the_true_tokens_of_each_position_and_stops_after_the_last(tiny_gpt2: LanguageModel) -> None:
    candidates, sequences = candidates_of(tiny_gpt2, TEXTS, QKV), truth(tiny_gpt2, TEXTS)
    assert len(candidates) == max(map(len, sequences))
    for position, tokens in enumerate(candidates):
        assert {ids[position] for ids in sequences if position < len(ids)} <= set(tokens.tolist())
        assert len(tokens) < 30  # a word-level vocabulary of hundreds: the filter filters


def test_the_query_gradient_alone_does_not_see_first_tokens(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    assert candidates_of(tiny_gpt2, TEXTS, QUERY) == []  # position 0 is empty
    rotary, sequences = candidates_of(tiny_llama, TEXTS, QUERY), truth(tiny_llama, TEXTS)
    later = {token for ids in sequences for token in ids[1:]}
    assert set(rotary[0].tolist()) == later
    assert later < {token for ids in sequences for token in ids}


def test_repeated_first_tokens_end(tiny_llama: LanguageModel) -> None:
    texts = ["very very good tea", "we had good tea"]
    assert_exact(textbook_attack(tiny_llama, client_update(tiny_llama, texts)), truth(tiny_llama, texts))
    adapter = adapter_for(tiny_llama.network)
    assert isinstance(adapter, DecoderAdapter)
    token = torch.tensor(tiny_llama.tokenizer("very")["input_ids"])
    basis = textbook_span(gradient(tiny_llama, texts, 1, QKV))
    chain = textbook_decoder_search(adapter, basis, [token] * adapter.max_positions)
    assert sorted(map(len, chain)) == list(range(1, REPEATS_FOLLOWED + 1))


def test_progress_tells_the_stages(tiny_gpt2: LanguageModel) -> None:
    calls = []
    update, sequences = client_update(tiny_gpt2, TEXTS), truth(tiny_gpt2, TEXTS)
    found = textbook_attack(tiny_gpt2, update, progress=lambda *call: calls.append(call))
    longest = max(map(len, sequences))
    assert [call for call in calls if call[0] == "filter"] == [("filter", n + 1, None) for n in range(longest)]
    assert calls[-1] == ("search", len({ids[: n + 1] for ids in sequences for n in range(len(ids))}), None)
    assert list(found.seconds) == ["subspace", "filter", "search", "total"]


@every(*ALL)
def test_updates_without_an_answer_have_a_status(model: LanguageModel, random_texts: Draw) -> None:
    update = client_update(model, TEXTS)
    names = adapter_for(model.network).tap(1, QKV).parameters
    part = {key: value for key, value in update.gradients.items() if not key.endswith(names)}
    zero = {key: torch.zeros_like(value) for key, value in update.gradients.items()}
    noise = {key: torch.randn_like(value) for key, value in update.gradients.items()}
    long = client_update(model, random_texts(12, 0, 9, 9)).gradients
    cases = [(part, Status.NO_SIGNAL), (zero, Status.NO_SIGNAL), (noise, Status.SATURATED), (long, Status.SATURATED)]
    for gradients, status in cases:
        found = textbook_attack(model, Update(gradients))
        assert (found.status, found.sequences) == (status, ())
    for strict in ({"span_threshold_0": 1e-12}, {"span_threshold_1": 1e-12}):
        found = textbook_attack(model, update, **strict)
        assert (found.status, found.sequences) == (Status.WRONG_MODEL, ())


@every("tiny_gpt2", "tiny_llama")
def test_rows_that_no_prefix_explains_leave_the_answer_partial(model: LanguageModel) -> None:
    """Rows of another batch in block 1's gradient alone: the texts are still found, and known not to be all."""
    mine, other = (client_update(model, texts).gradients for texts in (TEXTS[:2], TEXTS[2:]))
    names = adapter_for(model.network).tap(1, QKV).parameters
    mixed = {name: value + other[name] if name.endswith(names) else value for name, value in mine.items()}
    found = textbook_attack(model, Update(mixed))
    assert set(found.sequences) == truth(model, TEXTS[:2])
    assert found.status == Status.PARTIAL


def test_mistakes_have_one_line(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, tiny_bert: LanguageModel) -> None:
    with pytest.raises(DagerError, match="encoder"):
        textbook_attack(tiny_bert, client_update(tiny_bert, TEXTS))
    with pytest.raises(UpdateError):
        textbook_attack(tiny_llama, client_update(tiny_gpt2, TEXTS))
