"""The search by leverage: what still comes back when there are more prefixes than the model is wide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import random_model, word_tokenizer
from transformers import GPT2Config, LlamaConfig

from dager_tutorial.server.attack import attack
from dager_tutorial.client.step import client_update, encode
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.decoder.leverage import chance_quantile, standardised

WIDTH = 192


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model wide enough that most of its spectrum is not rounding, and narrow enough to be filled."""
    tokenizer = word_tokenizer()
    if request.param == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=WIDTH, n_layer=3, n_head=6, initializer_range=0.1
        )
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=512,
            initializer_range=0.1,
        )
    return random_model(request.param, config, tokenizer)


def test_texts_come_back_beyond_the_width_and_none_is_confirmed_in_vain(
    model: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    """More prefixes than dimensions: most texts come back, and what the last block confirms is true."""
    texts = random_texts(22, 3, 9, 9)
    truth = {tuple(ids) for ids in encode(model.tokenizer, texts)}
    assert len({ids[:end] for ids in truth for end in range(1, 10)}) > WIDTH
    found = attack(model, client_update(model, texts))
    assert found.status == "saturated"
    assert len(found.sequences) <= len(texts)
    assert len(truth & set(found.sequences)) >= len(texts) / 2
    confirmed = int(found.diagnosis.split(" texts confirmed")[0].split()[-1])
    assert len(truth & set(found.sequences)) >= confirmed


def test_deviations_are_robust_and_the_quantile_is_the_normal_one() -> None:
    usual = torch.randn(4001, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat([usual, torch.full((200,), -1e6)])
    torch.testing.assert_close(standardised(usual * 7 + 3, spoilt * 7 + 3), usual, atol=0.15, rtol=0.1)
    assert chance_quantile(0.5) == pytest.approx(0.0, abs=1e-12)
    assert chance_quantile(0.025) == pytest.approx(1.959964, abs=1e-6)
