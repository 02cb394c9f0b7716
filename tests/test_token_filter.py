"""The factored token filter against testing every pair by itself, and the graph that says what survives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import every
from torch import Tensor

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.server import budget
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import varied
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.pairs import Images, Squares
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates, filter_by_leverage, filter_tokens
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
ALL = ("tiny_gpt2", "shaken_gpt2", "tiny_bert", "shaken_bert", "tiny_llama", "qwen2")


def block_0(model: LanguageModel, update: Update) -> Span:
    evidence = evidence_of(model, update)
    span = evidence.span(evidence.adapter.tap(0, QKV))
    assert span is not None
    return span


def pairs_of(candidates: Candidates) -> set[tuple[int, int]]:
    """(token, position); for rotary models every token at position 0."""
    return {(int(token), place) for place, tokens in enumerate(candidates.tokens) for token in tokens}


def one_by_one(model: LanguageModel, span: Span) -> set[tuple[int, int]]:
    """Every token at every position, tested exactly."""
    source = adapter_for(model.network).first_input
    vocabulary = torch.arange(len(source.tokens))
    places = range(1 if source.positions is None else len(source.positions))
    found = set()
    for place in places:
        vectors = source.vectors(vocabulary, torch.full_like(vocabulary, place))
        passing = span.holds(vectors).nonzero()[:, 0]
        found |= {(int(token), place) for token in passing}
    return found


@every(*ALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_filter_equals_testing_every_pair(model: LanguageModel, dtype: str, random_texts: Draw) -> None:
    for size, seed in [(1, 5), (3, 6)]:
        texts = random_texts(size, seed)
        span = block_0(model, client_update(model, texts, config=ClientConfig(dtype=dtype)))
        wanted = one_by_one(model, span)
        for seed, pairs in [(0, 8192), (1, 50)]:
            with varied(filter_pairs=pairs):
                found = filter_tokens(adapter_for(model.network).first_input, span, Budget(seed=seed))
            assert pairs_of(found) == wanted
            assert found.count == len(wanted)
            assert found.every_position == (adapter_for(model.network).first_input.positions is None)


@every(*ALL)
def test_true_tokens_pass_and_candidates_are_what_the_graph_says(model: LanguageModel, random_texts: Draw) -> None:
    """With absolute positions exactly the pairs within one component of the graph pass; with rotary, the tokens."""
    rotary = adapter_for(model.network).first_input.positions is None
    for size, seed in [(1, 7), (2, 8), (3, 9)]:
        texts = random_texts(size, seed)
        true = {(t, i) for ids in encode(model.tokenizer, texts) for i, t in enumerate(ids)}
        span = block_0(model, client_update(model, texts))
        found = filter_tokens(adapter_for(model.network).first_input, span)
        if rotary:
            assert pairs_of(found) == {(token, 0) for token, _ in true}
            assert set(found.at(7).tolist()) == set(found.at(0).tolist())
            continue
        assert not len(found.at(10**6))
        without_cycle = len(true) == ranks_without_bias(true)
        bias = adapter_for(model.network).first_input.bias
        assert bias is not None
        # Without a cycle in the graph the norm's bias is not in the span, and joins no pair to another.
        assert pairs_of(found) == (true if without_cycle and bias.any() else closure(true))


def closure(true: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """All pairs of a token and a position of one connected component."""
    tokens = {token: {token} for token, _ in true}
    positions: dict[int, set[int]] = {token: {i for t, i in true if t == token} for token in tokens}
    for _ in tokens:
        for one in tokens:
            for other in tokens:
                if positions[one] & positions[other]:
                    positions[one] = positions[other] = positions[one] | positions[other]
    return {(token, place) for token in tokens for place in positions[token]}


def ranks_without_bias(true: set[tuple[int, int]]) -> int:
    """Tokens plus positions minus components."""
    tokens, places = {token for token, _ in true}, {place for _, place in true}
    together = {frozenset(place for other, place in closure(true) if other == token) for token in tokens}
    return len(tokens) + len(places) - len(together)


@every("shaken_gpt2", "shaken_bert")
def test_a_cycle_brings_the_bias_into_the_span(model: LanguageModel) -> None:
    """Four pairs of two words at two positions are a cycle: then every pair of a component passes, also elsewhere."""
    for texts, whole in [(["dog the cat", "is the"], False), (["dog the", "the dog", "dog the cat is cat"], True)]:
        true = {(t, i) for ids in encode(model.tokenizer, texts) for i, t in enumerate(ids)}
        span = block_0(model, client_update(model, texts))
        passed = pairs_of(filter_tokens(adapter_for(model.network).first_input, span))
        assert span.rank == ranks_without_bias(true) + whole
        assert passed == (closure(true) if whole else true)


def test_components_stay_apart(tiny_gpt2: LanguageModel) -> None:
    """One text of distinct words has as many components as words; a word at two places joins them."""
    for text, count in [("a cat is good", 4), ("a cat is a dog", 5), ("a a a", 3)]:
        span = block_0(tiny_gpt2, client_update(tiny_gpt2, [text]))
        ids = encode(tiny_gpt2.tokenizer, [text])[0]
        found = pairs_of(filter_tokens(adapter_for(tiny_gpt2.network).first_input, span))
        assert found == closure({(token, place) for place, token in enumerate(ids)})
        assert len(found) == count


@pytest.mark.parametrize("start", [5, 40])
def test_texts_that_begin_late(tiny_gpt2: LanguageModel, start: int) -> None:
    """Positions left of the first token hold none; those of its texts are found wherever they are."""
    network, adapter = copy.deepcopy(tiny_gpt2.network).requires_grad_(True), adapter_for(tiny_gpt2.network)
    ids = torch.tensor(encode(tiny_gpt2.tokenizer, ["the dog is good", "we want more milk"]))
    positions = torch.arange(start, start + 4).expand(2, 4)
    network(input_ids=ids, position_ids=positions).last_hidden_state[:, -1, ::2].square().sum().backward()
    update = Update({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    found = filter_tokens(adapter.first_input, block_0(tiny_gpt2, update))
    true = {(int(t), start + i) for row in ids for i, t in enumerate(row)}
    assert true <= pairs_of(found) == closure(true)
    assert len(found.tokens) == start + 4
    assert not any(len(tokens) for tokens in found.tokens[:start])


@every("tiny_gpt2", "tiny_llama")
def test_the_best_candidate_comes_first(model: LanguageModel, random_texts: Draw) -> None:
    source = adapter_for(model.network).first_input
    span = block_0(model, client_update(model, random_texts(3, 3), config=ClientConfig(dtype="bfloat16")))
    for place, tokens in enumerate(filter_tokens(source, span).tokens):
        ratios = span.ratio(source.vectors(tokens, torch.full_like(tokens, place)))
        assert ratios.tolist() == pytest.approx(sorted(ratios.tolist()), rel=1e-3)


def without_a_gap(model: LanguageModel, texts: list[str]) -> Span:
    """Block 0's span of a client whose noise leaves no gap: the screen has to pass nearly every pair."""
    gradients = client_update(model, texts).gradients
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor + 3e-2 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in gradients.items()
    }
    span = block_0(model, Update(noisy))
    assert not span.clear and not span.saturated
    return span


@every("tiny_gpt2", "tiny_bert")
@pytest.mark.parametrize("allowed", [0, 3])
def test_without_a_gap_the_filter_stops_at_the_deadline(
    model: LanguageModel, allowed: int, random_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes with the parts of the vocabulary, of which there are many where memory is short."""
    source, span, asked = adapter_for(model.network).first_input, without_a_gap(model, random_texts(2, 4)), []
    computed = Images.squares

    def squares(images: Images, *arguments: Tensor) -> Squares:
        asked.append(len(images.tokens))
        return computed(images, *arguments)

    monkeypatch.setattr(Images, "squares", squares)
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: len(asked)))
    whole = pairs_of(filter_tokens(source, span, Budget(memory=2**16)))
    assert whole == one_by_one(model, span) and len(asked) > allowed + 2
    asked.clear()
    found = pairs_of(filter_tokens(source, span, Budget(memory=2**16, deadline=allowed - 0.5)))
    assert len(asked) <= allowed + 2  # a part that was begun is finished
    assert found < whole


@every("tiny_gpt2", "tiny_bert")
def test_without_a_gap_few_pairs_are_tested_one_by_one(
    model: LanguageModel, random_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The screen has to pass nearly all; lengths and leverages of all pairs leave hardly more than the candidates."""
    source, span, asked = adapter_for(model.network).first_input, without_a_gap(model, random_texts(2, 4)), []
    exactly = Span.ratio
    monkeypatch.setattr(Span, "ratio", lambda span, vectors: asked.append(len(vectors)) or exactly(span, vectors))
    assert len(pairs_of(filter_tokens(source, span))) <= sum(asked) < 1.5 * len(one_by_one(model, span)) + 20


@pytest.mark.parametrize("model, size", [("tiny_gpt2", 12), ("tiny_llama", 16)], indirect=["model"])
def test_where_block_0_is_full_tokens_stand_out_by_their_leverage(
    model: LanguageModel, size: int, random_texts: Draw
) -> None:
    """As many distinct tokens as the model is wide: some of them come back, and hardly any others."""
    texts = random_texts(size, 5, 8, 8)
    span = block_0(model, client_update(model, texts, config=ClientConfig(task="next_token")))
    assert span.blurred
    found = filter_by_leverage(adapter_for(model.network).first_input, span, Budget())
    ids = encode(model.tokenizer, texts)
    anywhere = {(token, 0) for tokens in ids for token in tokens[:-1]}
    true = anywhere if found.every_position else {(t, i) for tokens in ids for i, t in enumerate(tokens[:-1])}
    assert {pair for pair in pairs_of(found) if pair[1] == 0} <= true and len(found.at(0)) > 5
    assert len(pairs_of(found) & true) >= 0.8 * found.count
    assert not filter_by_leverage(adapter_for(model.network).first_input, span, Budget(deadline=0.0)).count


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5, 1e-2, 1.0])
def test_rows_on_a_cycle_of_tokens_and_positions_pass_however_short_the_bias_is(
    tiny_gpt2: LanguageModel, size: float
) -> None:
    """Their dependence leaves the bias alone, which the gradient may be too coarse to show."""
    model = replace(tiny_gpt2, network=copy.deepcopy(tiny_gpt2.network))
    bias = model.network.h[0].ln_1.bias
    bias.data = size * torch.randn(len(bias), generator=torch.Generator().manual_seed(0))
    texts = ["we never knew", "my never cup", "we father cup", "my father knew her"]
    source, span = adapter_for(model.network).first_input, block_0(model, client_update(model, texts))
    ids = encode(model.tokenizer, texts)
    pairs = {(token, position) for text in ids for position, token in enumerate(text)}
    tokens, positions = torch.tensor(sorted(pairs)).T
    assert span.ratio(source.vectors(tokens, positions)).max() < span.bound
    assert not span.holds(source.vectors(tokens, positions + 7)).any()
