"""Where texts end: on trees made by hand, beside the last block of real updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from helpers import every, truth

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, local_update
from dager_tutorial.client.step import client_update
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP_OUTPUT, QUERY
from dager_tutorial.server.decoder.ends import Texts, whole_texts
from dager_tutorial.server.decoder.found import Found
from dager_tutorial.server.decoder.last_block import End, LastBlock
from dager_tutorial.server.decoder.neighbours import Neighbours
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.server.token_filter import Candidates

Draw = Callable[..., list[str]]
Sequences = set[tuple[int, ...]]
BEGINNINGS = ["the dog", "the dog is good", "the", "cat", "we want more milk"]
MODELS = ("tiny_gpt2", "tiny_llama", "tiny_llama_bos", "mistral", "smollm3")


def planted(model: LanguageModel, texts: Sequence[str], *, cut: int | None = None, rotary: bool = True) -> Tree:
    """The tree of all prefixes of these texts, or of what is left of them without so many last tokens."""
    tree = Tree()
    places: dict[tuple[int, ...], int] = {}
    whole = [tuple(ids)[: None if cut is None else -cut] for ids in encode(model.tokenizer, texts)]
    for tokens in sorted({ids[:end] for ids in whole for end in range(1, len(ids) + 1)}, key=len):
        parent = places.get(tokens[:-1])
        places[tokens] = tree.grow(parent, tokens[-1], start=0, ratio=1.0, rotary=rotary)
    return tree


def read(model: LanguageModel, texts: Sequence[str], task: str = "classification") -> Evidence:
    return evidence_of(model, client_update(model, texts, config=ClientConfig(task=task)))


def ends(evidence: Evidence, tree: Tree, kinds: Iterable[str] = (ATTENTION_OUTPUT, QUERY), **options: bool) -> Texts:
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    last = evidence.present(*(adapter.tap(adapter.num_blocks - 1, kind) for kind in kinds))
    assert len(last) == len(list(kinds))
    return whole_texts(adapter, tree, last, **options)


def tokens_of(tree: Tree, nodes: Iterable[int]) -> Sequences:
    return {tree.nodes[index].tokens for index in nodes}


@every(*MODELS)
@pytest.mark.parametrize("kinds", [(ATTENTION_OUTPUT,), (ATTENTION_OUTPUT, QUERY)])
def test_a_text_that_begins_another_is_found_where_only_its_end_has_a_row(
    model: LanguageModel, kinds: tuple[str, ...]
) -> None:
    tree = planted(model, BEGINNINGS)
    found = ends(read(model, BEGINNINGS), tree, kinds)
    assert found.seen and found.confirmed == set(found.nodes)
    assert tokens_of(tree, found.nodes) == truth(model, BEGINNINGS)


@every("tiny_gpt2", "tiny_llama")
def test_queries_alone_tell_the_ends_of_texts_of_two_tokens_and_more(model: LanguageModel) -> None:
    texts = ["the dog", "the dog is good", "we want more milk"]
    tree = planted(model, texts)
    found = ends(read(model, texts), tree, (QUERY,))
    assert tokens_of(tree, found.nodes) == tokens_of(tree, found.confirmed) == truth(model, texts)


@every(*MODELS)
def test_where_every_token_carries_a_loss_no_end_is_seen(model: LanguageModel) -> None:
    texts = [f"{text} now" for text in BEGINNINGS]  # the last token is only a target
    tree = planted(model, texts, cut=1)
    found = ends(read(model, texts, "next_token"), tree)
    assert not found.seen and not found.confirmed
    assert tokens_of(tree, found.nodes) == truth(model, texts, "next_token")


@every("tiny_gpt2", "tiny_llama", "smollm3")
def test_without_the_last_block_leaves_are_all_that_can_be_said(model: LanguageModel) -> None:
    tree = planted(model, BEGINNINGS)
    evidence = read(model, BEGINNINGS)
    found = ends(evidence, tree, ())
    assert not found.seen and not found.confirmed
    assert tokens_of(tree, found.nodes) == truth(model, ["the dog is good", "cat", "we want more milk"])
    assert ends(evidence, Tree()) == Texts((), frozenset(), seen=False)


@every("tiny_gpt2", "tiny_llama", "smollm3")
def test_a_stray_extension_is_left_out_unless_all_rows_are_known(model: LanguageModel) -> None:
    """Beyond an end a leaf without a row is stray; in a tree that is complete, it would be a text all the same."""
    tree = planted(model, [*BEGINNINGS, "cat again"])
    evidence = read(model, BEGINNINGS)
    found = ends(evidence, tree)
    assert tokens_of(tree, found.nodes) == tokens_of(tree, found.confirmed) == truth(model, BEGINNINGS)
    complete = ends(evidence, tree, complete=True)
    assert tokens_of(tree, complete.confirmed) == truth(model, BEGINNINGS)
    assert tokens_of(tree, complete.nodes) == truth(model, [*BEGINNINGS, "cat again"])


@every("tiny_gpt2", "tiny_llama", "smollm3")
def test_a_text_cut_short_is_reported_and_not_confirmed(model: LanguageModel) -> None:
    """There are as many texts as the last block has rows: the longest beginnings stand for those not found whole."""
    batch = ["we want more milk", "a cat came home"]
    tree = planted(model, ["we want more", "a cat came home", "we", "we wait"])
    found = ends(read(model, batch), tree)
    assert found.seen
    assert tokens_of(tree, found.confirmed) == truth(model, ["a cat came home"])
    assert tokens_of(tree, found.nodes) == truth(model, ["a cat came home", "we want more"])


def test_a_repeated_first_token_ends_at_its_shortest(tiny_llama: LanguageModel) -> None:
    """With rotary positions every length of it is one row."""
    batch = ["again again again", "again again bed", "good man the dog"]
    tree = planted(tiny_llama, batch)
    found = ends(read(tiny_llama, batch), tree)
    assert found.confirmed == set(found.nodes)
    assert tokens_of(tree, found.nodes) == truth(tiny_llama, ["again", *batch[1:]])


@every("tiny_gpt2", "tiny_llama")
def test_where_a_text_ends_at_every_row_ends_look_like_a_loss_at_every_token(model: LanguageModel) -> None:
    """Nothing tells the two apart, so that no end counts as seen."""
    texts = ["cat", "cat came", "dog"]
    tree = planted(model, texts)
    found = ends(read(model, texts), tree)
    assert not found.seen and tokens_of(tree, found.nodes) == truth(model, texts[1:])


@every("tiny_gpt2", "tiny_llama", "mistral", "qwen2")
def test_all_true_prefixes_and_the_ends_of_random_batches(model: LanguageModel, random_texts: Draw) -> None:
    """More leaves than are looked at in one pass, some of them beginnings of others."""
    texts = random_texts(10, 7, 2, 5)
    texts += [text.rsplit(" ", 1)[0] for text in texts[:4]]
    tree = planted(model, texts, rotary=model.name != "tiny-gpt2")
    found = ends(read(model, texts), tree)
    assert tokens_of(tree, found.nodes) == tokens_of(tree, found.confirmed) == truth(model, texts)


def test_as_many_ends_as_the_rank_allows_prove_nothing_where_more_pass(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In noise neighbours pass, too, and the likeliest are taken: that they are as many as the rank is no count."""
    tree, evidence = planted(tiny_gpt2, BEGINNINGS), read(tiny_gpt2, BEGINNINGS)
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    last = evidence.present(adapter.tap(adapter.num_blocks - 1, ATTENTION_OUTPUT))
    ((tap, span),) = last.items()
    for more, complete in ((0, True), (1, False)):
        ratios = {index: 0.5 if place < span.rank + more else 1e9 for place, index in enumerate(tree.real())}
        monkeypatch.setattr("dager_tutorial.server.decoder.ends.last_ratios", lambda *_, found=ratios: {tap: found})
        texts = whole_texts(adapter, tree, last)
        assert (texts.crowded, len(texts.confirmed)) == (not complete, span.rank)
        only = replace(texts, nodes=tuple(sorted(texts.confirmed)))
        assert Found(tree, only, {}, last).ends.complete is complete


def test_an_end_is_proven_where_no_neighbour_fits_and_not_where_the_text_goes_on(tiny_gpt2: LanguageModel) -> None:
    """A beginning passes where inputs moved so far that everything does; the token that is missing tells it."""
    texts = ["we want more milk", "a cat came home"]
    update = local_update(tiny_gpt2, texts, training=LocalTraining(2, 1, 1e-4))
    evidence = evidence_of(tiny_gpt2, update)
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter) and evidence.drifts
    last = evidence.present(adapter.tap(adapter.num_blocks - 1, ATTENTION_OUTPUT))
    generous = {tap: replace(span, arithmetic=1.0) for tap, span in last.items()}  # everything passes
    tokens = torch.tensor(sorted({token for text in truth(tiny_gpt2, texts) for token in text}))
    for spans, cut, proven in ((last, None, 2), (last, 1, 0), (generous, None, 2), (generous, 1, 0)):
        neighbours = Neighbours(adapter, spans, Candidates((tokens,), every_position=True), torch.Generator())
        nodes = planted(tiny_gpt2, texts, cut=cut)
        assert sum(neighbours.apart(nodes.nodes[leaf]) for leaf in nodes.leaves()) == proven


def test_without_proof_a_text_ends_where_its_last_row_fits_best(tiny_gpt2: LanguageModel) -> None:
    texts = ["we want more milk", "a cat came home"]
    evidence = evidence_of(tiny_gpt2, local_update(tiny_gpt2, texts, training=LocalTraining(2, 1, 1e-4)))
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    last = evidence.present(*(adapter.tap(adapter.num_blocks - 1, kind) for kind in (ATTENTION_OUTPUT, MLP_OUTPUT)))
    tree = planted(tiny_gpt2, [f"{texts[0]} again dog", texts[1], "the dog is good"])
    leaves = tree.leaves()
    ends = LastBlock(adapter, last).ends(tree, leaves)
    assert tokens_of(tree, tuple(end.node for end in ends.values())) == truth(tiny_gpt2, texts)
    assert all(end.clear and end.agreed for end in ends.values())
    assert not End(0, misfit=1.0, margin=9.0, agreed=True).clear and not End(0, 0.0, margin=0.1, agreed=True).clear
    one = {tap: span for tap, span in last.items() if tap.kind == MLP_OUTPUT}
    assert not LastBlock(adapter, one).ends(tree, leaves)
