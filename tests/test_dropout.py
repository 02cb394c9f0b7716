"""Clients that train with dropout: masks are read off the gradient, and the texts behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import WORDS, assert_exact, random_model, truth, word_tokenizer
from transformers import GPT2Config, LlamaConfig

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.dropout.absolute import mask_of
from dager_tutorial.server.dropout.rows import dropout_rate
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.status import Status
from dager_tutorial.update import Update

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 384}


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    """GPT-2, wide enough for masks of several rows."""
    tokenizer = word_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1}
    return random_model("wide-gpt2", GPT2Config(n_positions=128, initializer_range=0.02, **tokens, **SHAPE), tokenizer)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    """Llama, which drops attention weights alone."""
    tokenizer = word_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    config = LlamaConfig(num_key_value_heads=2, intermediate_size=512, initializer_range=0.05, **tokens, **SHAPE)
    return random_model("wide-llama", config, tokenizer)


def trained_with_dropout(model: LanguageModel, texts: list[str]) -> Update:
    """One step in training mode."""
    labels = [place % 2 for place in range(len(texts))]
    return client_update(model, texts, labels, config=ClientConfig(dropout=0.1))


def test_masks_in_the_embeddings_gradient_give_the_texts(gpt2: LanguageModel) -> None:
    texts = [" ".join(WORDS[place] for place in places) for places in ((5, 6, 7, 5, 8), (5, 9, 7, 6), (5, 6, 8, 8, 7))]
    update = trained_with_dropout(gpt2, texts)  # few words, so that most stand several times, and three alike in front
    assert dropout_rate(evidence_of(gpt2, update)) == pytest.approx(0.1, abs=0.02)
    assert_exact(attack(gpt2, update), truth(gpt2, texts), Status.TEXTS_COMPLETE)


def test_masks_of_attention_weights_give_the_texts(
    llama: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    texts = random_texts(3, 1)
    assert_exact(attack(llama, trained_with_dropout(llama, texts)), truth(llama, texts), Status.ROWS_COMPLETE)


def test_without_dropout_no_rate_is_read(gpt2: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    assert dropout_rate(evidence_of(gpt2, client_update(gpt2, random_texts(3, 2)))) is None


def test_two_masks_of_one_sum_are_told_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(300, generator=draw, dtype=torch.float64)
    masks = torch.rand(2, 300, generator=draw) < 0.1
    others = torch.randn(300, 20, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([(target * ~masks).T, others], 1)).Q
    first = mask_of(target, basis, torch.zeros(300, dtype=torch.bool))
    second = mask_of(target, basis, first)
    assert {tuple(first.tolist()), tuple(second.tolist())} == {tuple(mask.tolist()) for mask in masks}
