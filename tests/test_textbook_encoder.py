"""The textbook search of encoders: exact on small cases, each stage against its definition, and its limits."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from itertools import product

import pytest
import torch
from helpers import WORDS, assert_exact, every, truth

from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError, UpdateError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.status import Certainty, Status
from dager_tutorial.textbook import encoder
from dager_tutorial.textbook.block_inputs import first_block_inputs, second_block_inputs
from dager_tutorial.textbook.choices import EncoderSearchOptions, possible_lengths, search_size, texts_to_test
from dager_tutorial.textbook.encoder import text_distances, textbook_encoder_attack, textbook_encoder_search
from dager_tutorial.textbook.spans import TextbookSpans, span_distance, textbook_spans
from dager_tutorial.textbook.token_filter import textbook_token_filter
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
TEXTS = ["the old man", "we had good tea today", "the cat saw a dog"]
ALL = ["tiny_bert", "tiny_distilbert", "tiny_roberta"]


def first_blocks(model: LanguageModel, count: int) -> LanguageModel:
    """The same model with its first blocks only."""
    network = copy.deepcopy(model.network)
    network.encoder.layer = network.encoder.layer[:count]
    network.config.num_hidden_layers = count
    return dataclasses.replace(model, network=network)


def spans_of(model: LanguageModel) -> tuple[EncoderAdapter, TextbookSpans]:
    adapter = adapter_for(model.network)
    assert isinstance(adapter, EncoderAdapter)
    return adapter, textbook_spans(model, adapter, client_update(model, TEXTS))


@every(*ALL)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_text_comes_back_exactly(model: LanguageModel, random_texts: Draw, batch_size: int) -> None:
    adapter = adapter_for(model.network)
    taps = adapter.tap(0, QKV), adapter.tap(1, QKV)
    for seed in range(3):
        texts = random_texts(batch_size, seed, 3, 5)
        found = textbook_encoder_attack(model, client_update(model, texts))
        assert_exact(found, truth(model, texts), Status.TEXTS_COMPLETE)
        assert {" ".join(text.split()) for text in found.texts} == set(texts)
        assert all(0 <= score < 1 for score in found.scores)
        assert found.ranks[taps[1]] == sum(map(len, found.sequences))
        assert {(one.certainty, one.taps) for one in found.confirmations} == {(Certainty.WHOLE, taps)}


def test_neither_order_nor_scale_nor_repetition_of_the_batch_matters(tiny_bert: LanguageModel) -> None:
    update = client_update(tiny_bert, TEXTS)
    small, large = (
        Update({name: factor * gradient for name, gradient in update.gradients.items()}) for factor in (1e-4, 1e3)
    )
    shuffled = client_update(tiny_bert, [TEXTS[2], TEXTS[0], TEXTS[1]])
    repeated = client_update(tiny_bert, [*TEXTS, TEXTS[0]], [0, 1, 0, 0])
    for same in (small, large, shuffled, repeated):
        assert_exact(textbook_encoder_attack(tiny_bert, same), truth(tiny_bert, TEXTS))


@every(*ALL)
def test_the_network_is_stopped_at_what_it_would_compute(model: LanguageModel) -> None:
    adapter = adapter_for(model.network)
    ids = torch.randint(5, 300, (4, 6), generator=torch.Generator().manual_seed(0))
    tap = adapter.tap(1, QKV)
    assert torch.equal(second_block_inputs(adapter, ids), adapter.tap_inputs(ids, torch.ones_like(ids), [tap])[tap])
    for position in (0, 7):
        factors = adapter.first_input.vectors(ids[0], torch.full_like(ids[0], position))
        torch.testing.assert_close(first_block_inputs(adapter, ids[0], position), factors)


def test_a_texts_distance_is_the_mean_over_its_rows(tiny_bert: LanguageModel) -> None:
    adapter, spans = spans_of(tiny_bert)
    basis = spans.bases[1]
    true = max(truth(tiny_bert, TEXTS))
    texts = [true, (*true[:3], true[3] + 1, *true[4:])]
    ids = torch.tensor(texts)
    tap = adapter.tap(1, QKV)
    rows = adapter.tap_inputs(ids, torch.ones_like(ids), [tap])[tap].double()
    nearest = rows @ basis.double() @ torch.linalg.pinv(basis.double())
    expected = ((rows - nearest).norm(dim=2) / rows.norm(dim=2)).mean(1).tolist()
    distances = text_distances(adapter, basis, texts)
    assert list(distances) == texts
    assert list(distances.values()) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert distances[texts[0]] < 1e-5 < 1e-2 < distances[texts[1]]


def test_the_end_token_tells_the_lengths_and_candidates_hold_the_truth(tiny_bert: LanguageModel) -> None:
    adapter, spans = spans_of(tiny_bert)
    candidates = textbook_token_filter(adapter, spans.bases[0])
    sequences = truth(tiny_bert, TEXTS)
    begin, end = tiny_bert.tokenizer.cls_token_id, tiny_bert.tokenizer.sep_token_id
    assert {len(ids) for ids in sequences} <= set(possible_lengths(candidates, begin, end))
    for position, tokens in enumerate(candidates):
        assert {ids[position] for ids in sequences if position < len(ids)} <= set(tokens.tolist())
    assert possible_lengths(candidates[1:], begin, end) == possible_lengths([], begin, end) == []
    assert possible_lengths([torch.tensor([begin, end])], begin, end) == []  # no text is shorter than its frame
    everything = textbook_token_filter(adapter, spans.bases[0], threshold=2.0)[1]
    assert len(everything) == len(tiny_bert.tokenizer)
    distances = span_distance(first_block_inputs(adapter, everything, 1), spans.bases[0]).tolist()
    assert distances == pytest.approx(sorted(distances), abs=1e-6)  # nearest first


def test_every_combination_is_tested_once_and_the_end_token_at_the_end_only(tiny_bert: LanguageModel) -> None:
    adapter, spans = spans_of(tiny_bert)
    begin, end = tiny_bert.tokenizer.cls_token_id, tiny_bert.tokenizer.sep_token_id
    first, second, third = (torch.tensor([*tokens, end]) for tokens in ((10, 11), (12, 13, 14), (15,)))
    candidates = [torch.tensor([begin]), first, second, third]
    search = textbook_encoder_search(adapter, spans.bases[1], candidates, (begin, end), threshold=2.0)
    # lengths 2, 3 and 4: nothing, one or two words between
    between = [[], [(10, 11)], [(10, 11), (12, 13, 14)]]
    expected = [(begin, *words, end) for choices in between for words in product(*choices)]
    assert list(search.confirmed) == expected
    assert search.tested == search.possible == len(expected)


@pytest.mark.parametrize("sizes", [(), (1,), (1, 3, 2, 4), (2, 0, 5), (7, 7, 7)])
def test_search_size_counts_what_enumeration_gives(sizes: tuple[int, ...]) -> None:
    choices = [list(range(size)) for size in sizes]
    assert search_size(choices) == len(list(product(*choices)))
    assert list(texts_to_test(choices, 1000, 0)) == list(product(*choices))
    assert search_size([range(2)] * 5000) == 2**5000  # neither rounded nor overflowing


def test_draws_are_capped_seeded_and_cover_the_choices() -> None:
    choices = [[1], [2, 3, 4], [5, 6, 7], [2, 5], [8]]
    draws = [list(texts_to_test(choices, 17, seed)) for seed in (0, 0, 1)]
    assert list(map(len, draws)) == [17, 17, 17]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) <= set(product(*choices))
    assert [set(column) for column in zip(*draws[0], strict=True)] == [set(tokens) for tokens in choices]


def test_a_cap_bounds_the_search_and_says_so(tiny_bert: LanguageModel) -> None:
    update = client_update(tiny_bert, TEXTS)
    whole = textbook_encoder_attack(tiny_bert, update)
    calls = []
    few = EncoderSearchOptions(cap=5, seed=3)
    runs = [
        textbook_encoder_attack(tiny_bert, update, options=few, progress=lambda *call: calls.append(call))
        for _ in range(2)
    ]
    assert runs[0].sequences == runs[1].sequences
    assert set(runs[0].sequences) < set(whole.sequences)
    assert runs[0].status == Status.PARTIAL  # even where none is found: not every text was tested
    assert "of about 10^" in runs[0].diagnosis and "of about" not in whole.diagnosis
    stage, tested, total = calls[-1]
    assert (stage, tested) == ("search", total)
    assert tested in (5, 10, 15)  # so many for each length


def test_used_tokens_go_and_a_longer_text_that_shares_them_is_lost(tiny_bert: LanguageModel) -> None:
    update = client_update(tiny_bert, TEXTS)
    counts = {}
    for remove in (False, True):
        calls = []
        options = EncoderSearchOptions(remove_used=remove)
        found = textbook_encoder_attack(
            tiny_bert, update, options=options, progress=lambda *call, calls=calls: calls.append(call)
        )
        expected = TEXTS[:2] if remove else TEXTS  # "the" stands first in the short text and in the lost one
        assert_exact(found, truth(tiny_bert, expected), Status.PARTIAL if remove else Status.TEXTS_COMPLETE)
        counts[remove] = calls[-1][1]
    assert counts[True] < counts[False]


def test_fewer_candidates_never_add_a_text(tiny_bert: LanguageModel) -> None:
    update, everything = client_update(tiny_bert, TEXTS), truth(tiny_bert, TEXTS)
    sizes = []
    for number in (1, 2, 1000):
        calls = []
        options = EncoderSearchOptions(candidates_per_position=number)
        found = textbook_encoder_attack(
            tiny_bert, update, options=options, progress=lambda *call, calls=calls: calls.append(call)
        )
        assert set(found.sequences) <= everything
        complete = set(found.sequences) == everything
        assert found.status == (Status.TEXTS_COMPLETE if complete else Status.PARTIAL)
        sizes.append(calls[-1][1])
    assert sizes == sorted(sizes) and complete
    assert sizes[0] <= 3  # one text of each length


def test_that_no_text_passes_blames_the_model_only_where_all_were_tested(
    tiny_bert: LanguageModel, random_texts: Draw
) -> None:
    options = EncoderSearchOptions(candidates_per_position=1)
    updates = [client_update(tiny_bert, random_texts(3, seed, 4, 6)) for seed in range(4)]
    runs = [textbook_encoder_attack(tiny_bert, update, options=options) for update in updates]
    assert not all(found.sequences for found in runs)
    assert {found.status for found in runs} == {Status.PARTIAL}


def test_a_search_that_is_late_returns_what_it_has(tiny_bert: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turned clock: it stands still, but for the second that each batch of texts takes."""
    now, real = time.perf_counter, encoder.text_distances
    clock = [now()]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(*given: object) -> dict[tuple[int, ...], float]:
        clock[0] += 1.0
        return real(*given)

    monkeypatch.setattr(encoder, "text_distances", slow)
    update, everything = client_update(tiny_bert, TEXTS), truth(tiny_bert, TEXTS)
    runs = []
    for budget in (0.5, 1.5, 1e9):
        clock[0] = now()
        found = textbook_encoder_attack(tiny_bert, update, options=EncoderSearchOptions(time_budget=budget))
        complete = set(found.sequences) == everything
        assert found.status == (Status.TEXTS_COMPLETE if complete else Status.OUT_OF_TIME)
        assert found.confirmed == found.sequences
        assert ("of about" in found.diagnosis) == (not complete)
        runs.append(set(found.sequences))
    assert runs[0] <= runs[1] <= runs[2] == everything
    assert runs[0] < everything


def test_updates_without_an_answer_have_a_status(tiny_bert: LanguageModel, random_texts: Draw) -> None:
    update = client_update(tiny_bert, TEXTS)
    names = adapter_for(tiny_bert.network).tap(1, QKV).parameters
    part = {key: value for key, value in update.gradients.items() if not key.endswith(names)}
    zero = {key: torch.zeros_like(value) for key, value in update.gradients.items()}
    noise = {key: torch.randn_like(value) for key, value in update.gradients.items()}
    long = client_update(tiny_bert, random_texts(12, 0, 9, 9)).gradients
    cases = [(part, Status.NO_SIGNAL), (zero, Status.NO_SIGNAL), (noise, Status.SATURATED), (long, Status.SATURATED)]
    for gradients, status in cases:
        found = textbook_encoder_attack(tiny_bert, Update(gradients))
        assert (found.status, found.sequences) == (status, ())
    for strict in ({"span_threshold_0": 1e-12}, {"span_threshold_1": 1e-12}):
        found = textbook_encoder_attack(tiny_bert, update, **strict)
        assert (found.status, found.sequences) == (Status.WRONG_MODEL, ())


def test_a_last_block_names_no_more_tokens_than_its_heads_allow(tiny_bert: LanguageModel) -> None:
    two = first_blocks(tiny_bert, 2)
    most = 2 * two.network.config.num_attention_heads + 1
    second = adapter_for(two.network).tap(1, QKV)
    for length in (most, most + 1):
        text = " ".join(WORDS[: length - 2])
        found = textbook_encoder_attack(two, client_update(two, [text]))
        assert found.ranks[second] == most
        if length == most:
            assert_exact(found, truth(two, [text]))
        else:
            assert (found.status, found.sequences) == (Status.WRONG_MODEL, ())
        assert_exact(textbook_encoder_attack(tiny_bert, client_update(tiny_bert, [text])), truth(tiny_bert, [text]))


def test_mistakes_have_one_line(tiny_bert: LanguageModel, tiny_gpt2: LanguageModel) -> None:
    update = client_update(tiny_bert, TEXTS)
    with pytest.raises(DagerError, match=r"tiny-gpt2.*causal"):
        textbook_encoder_attack(tiny_gpt2, client_update(tiny_gpt2, TEXTS))
    with pytest.raises(UpdateError):
        textbook_encoder_attack(tiny_bert, client_update(tiny_gpt2, TEXTS))
    with pytest.raises(DagerError, match="one block"):
        one = first_blocks(tiny_bert, 1)
        textbook_encoder_attack(one, client_update(one, TEXTS))
    with pytest.raises(DagerError, match="adds 0 tokens"):
        textbook_encoder_attack(dataclasses.replace(tiny_bert, tokenizer=tiny_gpt2.tokenizer), update)
    for options in ({"cap": 0}, {"candidates_per_position": 0}, {"time_budget": -1.0}):
        with pytest.raises(DagerError, match=next(iter(options))):
            EncoderSearchOptions(**options)
