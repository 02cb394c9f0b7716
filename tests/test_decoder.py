"""The prefix search against a search that recomputes everything, and its traps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import every

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.decoder.residual import ResidualSelector
from dager_tutorial.server.decoder.search import TreeSearch
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates, filter_tokens

Draw = Callable[..., list[str]]
Prefixes = set[tuple[int, ...]]
PLACES = [(0, ATTENTION_OUTPUT), (0, MLP), (1, QKV)]
ALL = ("tiny_gpt2", "tiny_llama", "tiny_llama_bos", "mistral", "qwen2", "smollm3", "smollm3-nope")


def evidence(model: LanguageModel, texts: list[str]) -> tuple[Evidence, Candidates]:
    """Spans and candidates of a batch under next-token loss: every prefix but the whole text has a gradient."""
    read = evidence_of(model, client_update(model, texts, config=ClientConfig(task="next_token")))
    first = read.span(read.adapter.tap(0, QKV))
    assert first is not None
    return read, filter_tokens(read.adapter.first_input, first)


def spans(read: Evidence, places: Sequence[tuple[int, str]]) -> dict[Tap, Span]:
    return read.present(*(read.adapter.tap(*place) for place in places))


def search(
    read: Evidence,
    candidates: Candidates,
    places: Sequence[tuple[int, str]] = PLACES,
    budget: Budget | None = None,
) -> Tree:
    assert isinstance(read.adapter, DecoderAdapter)
    tested = spans(read, places)
    expected = tested[read.adapter.tap(*places[-1])].rank
    budget = budget or Budget()
    selector = ResidualSelector(read.adapter, tested, budget, counted=True)
    return TreeSearch(candidates, selector, budget, expected).run()


def prefixes(model: LanguageModel, texts: list[str]) -> Prefixes:
    ids = [tuple(tokens[:-1]) for tokens in encode(model.tokenizer, texts)]
    return {tokens[: end + 1] for tokens in ids for end in range(len(tokens))}


def recomputed(model: LanguageModel, read: Evidence, candidates: Candidates, longest: int) -> Prefixes:
    """Every candidate after every confirmed prefix, by whole forward passes, tested in all three taps."""
    adapter = adapter_for(model.network)
    tested = spans(read, PLACES)
    assert len(tested) == len(PLACES)
    found: Prefixes = set()
    front: list[tuple[int, ...]] = [()]
    for place in range(longest):
        tried = [(*prefix, int(token)) for prefix in front for token in candidates.at(place)]
        if not tried:
            break
        ids = torch.tensor(tried)
        good = torch.ones(len(tried), dtype=torch.bool)
        for tap, vectors in adapter.tap_inputs(ids, torch.ones_like(ids), tested).items():
            good &= tested[tap].holds(vectors[:, -1])
        front = [tokens for tokens, kept in zip(tried, good.tolist(), strict=True) if kept]
        found |= set(front)
    return found


def without_chains(found: Prefixes) -> Prefixes:
    """All but a first token repeated and nothing else, which the tree follows only as far as it must."""
    return {tokens for tokens in found if len(tokens) == 1 or len({*tokens}) > 1}


def kept(tree: Tree) -> Prefixes:
    return {node.tokens for node in tree.nodes}


def real(tree: Tree) -> Prefixes:
    return {tree.nodes[index].tokens for index in tree.real()}


def leaves(tree: Tree) -> Prefixes:
    return {tree.nodes[index].tokens for index in tree.leaves()}


@every(*ALL)
def test_the_tree_holds_the_batchs_prefixes_and_equals_the_recomputed_search(
    model: LanguageModel, random_texts: Draw
) -> None:
    texts = [*random_texts(2, 11, 3, 7), "good good dog is good"]
    read, candidates = evidence(model, texts)
    tree = search(read, candidates)
    assert real(tree) == prefixes(model, texts)
    longest = max(len(node.tokens) for node in tree.nodes)
    assert without_chains(kept(tree)) == without_chains(recomputed(model, read, candidates, longest))


@every(*ALL)
def test_any_one_tap_and_any_memory_give_the_same_tree(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(2, 12, 3, 6)
    read, candidates = evidence(model, texts)
    for places in ([PLACES[2]], PLACES[:1] + PLACES[2:], PLACES):
        assert real(search(read, candidates, places)) == prefixes(model, texts), places
    whole, *others = (
        kept(search(read, candidates, PLACES, budget))
        for budget in (Budget(memory=2**28), Budget(memory=1), Budget(seed=3))
    )
    assert others == [whole, whole]


@every("tiny_gpt2", "tiny_llama", "tiny_llama_bos")
def test_nodes_say_where_they_come_from(model: LanguageModel) -> None:
    texts = ["the dog is good now", "the dog was bad now", "the cat is good now"]
    tree = search(*evidence(model, texts))
    for index, node in enumerate(tree.nodes):
        assert (node.parent is None) == (len(node.tokens) == 1)
        if node.parent is not None:
            before = tree.nodes[node.parent]
            assert node.parent < index and before.tokens == node.tokens[:-1]
            assert before.ratio <= node.ratio
    assert leaves(tree) == {tuple(ids[:-1]) for ids in encode(model.tokenizer, texts)}
    assert tree.distinct_rows() == len(prefixes(model, texts))


REPEATS = [
    (name, times)
    for name in ("tiny_llama", "mistral", "qwen2", "smollm3", "smollm3-nope")
    for times in (2, 3, 7)
    if name != "mistral" or times <= 3  # beyond its window no state depends on how many there are
]


@pytest.mark.parametrize("model, times", REPEATS, indirect=["model"])
def test_a_repeated_first_token_ends_and_counts_once(model: LanguageModel, times: int) -> None:
    texts = ["again " * times + "dog is good", "a cat came"]
    tree = search(*evidence(model, texts))
    chain = [node for node in tree.nodes if set(node.tokens) == {node.tokens[0]} and len(node.tokens) > 1]
    assert len(chain) >= times - 1 and all(node.repeats for node in chain)
    assert len(tree.nodes) < 40
    assert leaves(tree) == {tuple(ids[:-1]) for ids in encode(model.tokenizer, texts)}
    assert tree.distinct_rows() == len(prefixes(model, texts)) - times + 1


def test_absolute_positions_have_no_chains(tiny_gpt2: LanguageModel) -> None:
    texts = ["again again again dog is"]
    tree = search(*evidence(tiny_gpt2, texts))
    assert not any(node.repeats for node in tree.nodes)
    assert kept(tree) == prefixes(tiny_gpt2, texts)


def test_progress_counts_prefixes(tiny_gpt2: LanguageModel) -> None:
    calls: list[tuple[str, int, int | None]] = []
    budget = Budget(progress=lambda *call: calls.append(call))
    search(*evidence(tiny_gpt2, ["the dog is good"]), [(1, QKV)], budget)
    assert calls[:3] == [("search", 1, 3), ("search", 2, 3), ("search", 3, 3)]


@every("tiny_gpt2", "tiny_llama")
def test_more_extensions_than_rows_stop_the_search(model: LanguageModel, random_texts: Draw) -> None:
    """A test that passes everything has no power: as many are kept as there can be, and none of them is grown."""
    read, candidates = evidence(model, random_texts(2, 12, 3, 6))
    assert isinstance(read.adapter, DecoderAdapter)
    budget = Budget()
    selector = ResidualSelector(read.adapter, {}, budget)
    selector.widest = 3
    tree = TreeSearch(candidates, selector, budget).run()
    counts = Counter(node.start + len(node.tokens) for node in tree.nodes)
    assert tree.overflowed and counts[max(counts)] == 3 and max(counts) <= 2
