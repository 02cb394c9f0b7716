"""The search by summed evidence: what still comes back when there are more prefixes than the model is wide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import random_model, truth, word_tokenizer
from transformers import GPT2Config, LlamaConfig

from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.status import Certainty, Status
from dager_tutorial.update import Update

WIDTH = 192


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model wide enough that most of its spectrum is not rounding, and narrow enough to be filled."""
    tokenizer = word_tokenizer()
    if request.param == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            bos_token_id=1,
            eos_token_id=1,
            n_embd=WIDTH,
            n_layer=3,
            n_head=6,
            initializer_range=0.1,
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
    """More prefixes than dimensions: most texts come back, and every text that the last block confirms is true."""
    texts = random_texts(22, 3, 9, 9)
    true = truth(model, texts)
    assert len({ids[:end] for ids in true for end in range(1, 10)}) > WIDTH
    found = attack(model, client_update(model, texts))
    assert found.status in {Status.SATURATED, Status.ENDS_CONFIRMED}
    assert len(found.sequences) <= len(texts)
    assert len(true & set(found.sequences)) >= 0.7 * len(texts)
    confirmed = {
        tokens
        for tokens, confirmation in zip(found.sequences, found.confirmations, strict=True)
        if confirmation.certainty is not Certainty.GUESS
    }
    assert confirmed == set(found.confirmed) <= true and len(confirmed) >= 0.7 * len(texts)
    assert all(
        {tap.block for tap in confirmation.taps} == {2}
        for confirmation in found.confirmations
        if confirmation.certainty is Certainty.WHOLE
    )


def test_evidence_alone_confirms_nothing(model: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """Without the last block's gradients texts come back all the same, and every one of them is called a guess."""
    texts = random_texts(22, 3, 9, 9)
    update = client_update(model, texts)
    found = attack(model, Update({name: each for name, each in update.gradients.items() if ".2." not in name}))
    assert found.status is Status.SATURATED
    assert len(truth(model, texts) & set(found.sequences)) >= len(texts) / 3
    assert {confirmation.certainty for confirmation in found.confirmations} == {Certainty.GUESS}
    assert not found.confirmed
