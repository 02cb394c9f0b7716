"""The prefix search against a search that recomputes everything, and its traps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_models import family

from dager_tutorial.client.step import client_update, encode
from dager_tutorial.server.decoder.tree import PrefixSearch, Tree
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.models import adapter_for
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.token_filter import Candidates, filter_tokens

Draw = Callable[..., list[str]]
Prefixes = set[tuple[int, ...]]
PLACES = [(0, ATTENTION_OUTPUT), (0, MLP), (1, QKV)]
ALL = ["tiny_gpt2", "tiny_llama", "tiny_llama_bos", "mistral", "qwen2", "smollm3", "smollm3-nope"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param) if request.param.startswith("tiny_") else family(request.param)


def every(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", names, indirect=True)


def evidence(model: LanguageModel, texts: list[str]) -> tuple[Evidence, Candidates]:
    """Spans and candidates of a batch under next-token loss: every prefix but the whole text has a gradient."""
    read = evidence_of(model, client_update(model, texts, task="next_token"))
    first = read.span(0, QKV)
    assert first is not None
    return read, filter_tokens(read.adapter.first_input, first)


def search(
    read: Evidence, candidates: Candidates, places: list[tuple[int, str]], memory: int = 2**24, seed: int = 0
) -> Tree:
    assert isinstance(read.adapter, DecoderAdapter)
    spans = {place: span for place in places if (span := read.span(*place)) is not None}
    expected = spans[places[-1]].rank
    return PrefixSearch(read.adapter, spans, candidates, expected_rows=expected, memory=memory, seed=seed).run()


def prefixes(model: LanguageModel, texts: list[str]) -> Prefixes:
    ids = [tuple(tokens[:-1]) for tokens in encode(model.tokenizer, texts)]
    return {tokens[: end + 1] for tokens in ids for end in range(len(tokens))}


def recomputed(model: LanguageModel, read: Evidence, candidates: Candidates, longest: int) -> Prefixes:
    """Every candidate after every confirmed prefix, by whole forward passes, tested in all three taps."""
    adapter = adapter_for(model.network)
    taps = [adapter.tap(*place) for place in PLACES]
    found: Prefixes = set()
    front: list[tuple[int, ...]] = [()]
    for place in range(longest):
        tried = [(*prefix, int(token)) for prefix in front for token in candidates.at(place)]
        if not tried:
            break
        ids = torch.tensor(tried)
        good = torch.ones(len(tried), dtype=torch.bool)
        for tap, vectors in adapter.tap_inputs(ids, torch.ones_like(ids), taps).items():
            span = read.span(tap.block, tap.kind)
            assert span is not None
            good &= span.ratio(vectors[:, -1]) <= span.bound
        front = [tokens for tokens, kept in zip(tried, good.tolist(), strict=True) if kept]
        found |= set(front)
    return found


def without_chains(found: Prefixes) -> Prefixes:
    """All but a first token repeated and nothing else, which the tree follows only as far as it must."""
    return {tokens for tokens in found if len(tokens) == 1 or len({*tokens}) > 1}


def kept(tree: Tree) -> Prefixes:
    return {node.tokens for node in tree.nodes}


@every(ALL)
def test_the_tree_holds_the_batchs_prefixes_and_equals_the_recomputed_search(
    model: LanguageModel, random_texts: Draw
) -> None:
    texts = [*random_texts(2, 11, 3, 7), "good good dog is good"]
    read, candidates = evidence(model, texts)
    tree = search(read, candidates, PLACES)
    assert {node.tokens for index, node in enumerate(tree.nodes) if index in tree.real()} == prefixes(model, texts)
    longest = max(len(node.tokens) for node in tree.nodes)
    assert without_chains(kept(tree)) == without_chains(recomputed(model, read, candidates, longest))


@every(ALL)
def test_any_one_tap_and_any_memory_give_the_same_tree(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(2, 12, 3, 6)
    read, candidates = evidence(model, texts)
    wanted = prefixes(model, texts)
    for places in ([PLACES[2]], PLACES[:1] + PLACES[2:], PLACES):
        tree = search(read, candidates, places)
        assert {tree.nodes[index].tokens for index in tree.real()} == wanted, places
    whole, cut = (search(read, candidates, PLACES, memory=memory) for memory in (2**28, 1))
    assert kept(whole) == kept(cut) == kept(search(read, candidates, PLACES, seed=3))


@every(["tiny_gpt2", "tiny_llama", "tiny_llama_bos"])
def test_nodes_say_where_they_come_from(model: LanguageModel) -> None:
    texts = ["the dog is good now", "the dog was bad now", "the cat is good now"]
    read, candidates = evidence(model, texts)
    tree = search(read, candidates, PLACES)
    for node in tree.nodes:
        assert (node.parent is None) == (len(node.tokens) == 1)
        if node.parent is not None:
            before = tree.nodes[node.parent]
            assert before.tokens == node.tokens[:-1]
            assert before.ratio <= node.ratio
    leaves = {tree.nodes[index].tokens for index in tree.leaves()}
    assert leaves == {tuple(ids[:-1]) for ids in encode(model.tokenizer, texts)}
    assert tree.distinct_rows() == len(prefixes(model, texts))


@every(["tiny_llama", "mistral", "qwen2", "smollm3", "smollm3-nope"])
@pytest.mark.parametrize("times", [2, 3, 7])
def test_a_repeated_first_token_ends_and_counts_once(model: LanguageModel, times: int) -> None:
    if model.name == "tiny-mistral" and times > 3:
        times = 3  # beyond the window no state depends on how many there are
    texts = ["again " * times + "dog is good", "a cat came"]
    read, candidates = evidence(model, texts)
    tree = search(read, candidates, PLACES)
    chain = [node for node in tree.nodes if set(node.tokens) == {node.tokens[0]} and len(node.tokens) > 1]
    assert all(node.repeats for node in chain)
    assert len(tree.nodes) < 40
    assert {tree.nodes[index].tokens for index in tree.leaves()} == {
        tuple(ids[:-1]) for ids in encode(model.tokenizer, texts)
    }
    assert tree.distinct_rows() == len(prefixes(model, texts)) - times + 1


def test_absolute_positions_have_no_chains(tiny_gpt2: LanguageModel) -> None:
    texts = ["again again again dog is"]
    read, candidates = evidence(tiny_gpt2, texts)
    tree = search(read, candidates, PLACES)
    assert not any(node.repeats for node in tree.nodes)
    assert kept(tree) == prefixes(tiny_gpt2, texts)


def test_progress_counts_prefixes(tiny_gpt2: LanguageModel) -> None:
    read, candidates = evidence(tiny_gpt2, ["the dog is good"])
    assert isinstance(read.adapter, DecoderAdapter)
    span, calls = read.span(1, QKV), []
    assert span is not None
    PrefixSearch(
        read.adapter,
        {(1, QKV): span},
        candidates,
        expected_rows=None,
        memory=2**24,
        progress=lambda done, total: calls.append((done, total)),
    ).run()
    assert [done for done, _ in calls][:3] == [1, 2, 3]
    assert all(total is None for _, total in calls)
