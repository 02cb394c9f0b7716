"""Clients that train with dropout: masks are read off the gradient, and the texts behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import WORDS, assert_exact, random_model, truth, word_tokenizer
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

from dager_tutorial.client.step import client_update
from dager_tutorial.models.heads import Head, choose_pad, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.training import filled_and_masked, own_copy, requiring_grad
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


def trained_with_dropout(model: LanguageModel, texts: list[str], rate: float = 0.1) -> Update:
    """One step in training mode."""
    network: PreTrainedModel = own_copy(model.network, torch.float32)
    client = with_head(network, model.tokenizer, Head()).train()
    for module in client.modules():
        for name in ("p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    padded, mask = filled_and_masked(ids, choose_pad(client, model.tokenizer, ids), device=model.device)
    parameters = dict(client.named_parameters())
    torch.manual_seed(0)
    with requiring_grad(parameters):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        labels = torch.tensor([place % 2 for place in range(len(texts))])
        loss = client(input_ids=padded, attention_mask=mask, position_ids=places, labels=labels).loss
        found = torch.autograd.grad(loss, list(parameters.values()))
    return Update({name: each.detach() for name, each in zip(parameters, found, strict=True)})


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
