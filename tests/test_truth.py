"""The truth: what the network saw, token by token, whatever the client was asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from dager_tutorial.client.batch import Truth, encode, truth_of
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.masking import masked_inputs
from dager_tutorial.client.step import client_update, play
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel

CAUSAL = ("tiny_gpt2", "tiny_llama", "tiny_llama_bos")
MASKED = ("tiny_masked_bert", "tiny_distilbert", "tiny_roberta")
KINDS = [
    *((name, task) for name in CAUSAL for task in ("classification", "next_token")),
    *((name, task) for name in MASKED for task in ("classification", "masked")),
    ("tiny_bert", "classification"),
]
texts_of_words = st.lists(st.sampled_from(WORDS), min_size=2, max_size=9).map(" ".join)


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest) -> dict[str, LanguageModel]:
    """The tiny models by name."""
    return {name: request.getfixturevalue(name) for name, _ in KINDS}


def seen_by(model: LanguageModel, texts: list[str], config: ClientConfig) -> list[tuple[int, ...]]:
    """The token ids that reach the network's embedding while the client computes its update, pads left out."""
    ids, masks = [], []
    embedding = model.network.get_input_embeddings()
    handles = (
        embedding.register_forward_pre_hook(lambda _, args: ids.append(args[0])),
        model.network.register_forward_pre_hook(lambda _, __, k: masks.append(k["attention_mask"]), with_kwargs=True),
    )
    client_update(model, texts, config=config)
    for handle in handles:
        handle.remove()
    assert len(ids) == len(masks) == 1  # one forward pass
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids[0], masks[0], strict=True)]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(texts_of_words, min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(4, 8)),
    st.integers(0, 99),
    st.sampled_from(["cross_entropy", "frobenius"]),
    st.sampled_from(["right", "left"]),
)
def test_the_truth_is_what_the_network_saw(tiny, kind, texts, max_length, seed, loss, side) -> None:
    name, task = kind
    model = tiny[name]
    side = side if name in CAUSAL else "right"
    config = ClientConfig(task, loss, share="attention", padding_side=side, max_length=max_length, seed=seed)
    seen = seen_by(model, texts, config)
    truth = truth_of(model, texts, config=config)
    assert truth.sequences == tuple(ids[:-1] if task == "next_token" else ids for ids in seen)
    assert truth.n_tokens == sum(map(len, seen))
    plain = [model.tokenizer(text)["input_ids"] for text in texts]
    assert [len(ids) for ids in seen] == [min(len(ids), max_length or len(ids)) for ids in plain]
    if task != "masked" and max_length is None:
        assert seen == [tuple(ids) for ids in plain]


@pytest.mark.parametrize(("name", "task"), KINDS)
def test_play_is_the_update_and_the_truth(name: str, task: str, tiny) -> None:
    texts, labels = ["the old man walks", "a cat", "the old man walks"], [0, 2, 1]
    config = ClientConfig(task=task, max_length=5, seed=3)
    update, truth = play(tiny[name], texts, labels, config=config)
    alone = client_update(tiny[name], texts, labels, config=config)
    assert list(update.gradients) == list(alone.gradients)
    assert all(torch.equal(gradient, alone.gradients[key]) for key, gradient in update.gradients.items())
    assert truth == truth_of(tiny[name], texts, labels, config=config)
    assert (truth.texts, truth.labels, truth.task, truth.hidden_size) == (tuple(texts), (0, 2, 1), task, 64)


def test_defaults_are_those_of_the_configuration(tiny_gpt2: LanguageModel) -> None:
    texts = ["the old man walks", "a cat"]
    update, truth = play(tiny_gpt2, texts)
    asked, same = play(tiny_gpt2, texts, [0, 1], config=ClientConfig())
    assert truth == same and truth.labels == (0, 1)
    assert all(torch.equal(gradient, asked.gradients[name]) for name, gradient in update.gradients.items())


def test_the_frame_is_what_the_tokenizer_adds_and_pads(tiny_bert: LanguageModel, tiny_gpt2: LanguageModel) -> None:
    added = tiny_bert.tokenizer("")["input_ids"]
    assert truth_of(tiny_bert, ["a cat"]).frame == {*added, tiny_bert.tokenizer.pad_token_id}
    assert truth_of(tiny_gpt2, ["a cat"]).frame == {tiny_gpt2.tokenizer.eos_token_id}


def test_equal_texts_are_corrupted_one_by_one_and_each_has_its_own_truth(tiny_distilbert: LanguageModel) -> None:
    texts = [" ".join(WORDS[:30])] * 3
    config = ClientConfig(task="masked")
    truth = truth_of(tiny_distilbert, texts, config=config)
    inputs, _ = masked_inputs(tiny_distilbert.tokenizer, encode(tiny_distilbert.tokenizer, texts), config.seed)
    assert truth.sequences == tuple(map(tuple, inputs))
    assert len(set(truth.sequences)) == 3
    assert truth_of(tiny_distilbert, texts, config=replace(config, seed=1)).sequences != truth.sequences


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tiny_bert", ClientConfig(task="next_token"), "needs a causal model"),
        ("tiny_gpt2", ClientConfig(task="masked"), "needs a bidirectional model"),
        ("tiny_bert", ClientConfig(max_length=1), "must exceed the 2 special tokens"),
    ],
)
def test_what_no_client_can_do_has_no_truth(name: str, config: ClientConfig, message: str, tiny) -> None:
    with pytest.raises(DagerError, match=message):
        truth_of(tiny[name], ["a cat"], config=config)


def test_no_text_has_no_tokens(tiny_bert: LanguageModel) -> None:
    assert encode(tiny_bert.tokenizer, []) == []
    with pytest.raises(DagerError, match="the batch is empty"):
        truth_of(tiny_bert, [])


def test_a_truth_cannot_be_changed(tiny_gpt2: LanguageModel) -> None:
    truth = truth_of(tiny_gpt2, ["a cat"])
    with pytest.raises(AttributeError):
        truth.texts = ()
    assert isinstance(truth, Truth) and hash(truth) == hash(truth_of(tiny_gpt2, ["a cat"]))
