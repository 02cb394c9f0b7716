"""Updates that were pruned or rounded to a grid: recovered, and confirmed only by what was sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_exact, random_model, truth, word_tokenizer
from transformers import LlamaConfig

from dager_tutorial.client.defenses.pruning import Pruning
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.completion.certificate import unexplained_share
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.missing.filling import filled
from dager_tutorial.status import Status
from dager_tutorial.update import Update

DEFENCES = {
    "half": Pruning(50),
    "third": Pruning(30),
    "nearest": Rounding("int8"),
    "by chance": Rounding("int8", stochastic=True),
}


def defended(defence: str, update: Update) -> Update:
    return Update(DEFENCES[defence](update.gradients, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def wide(request: pytest.FixtureRequest) -> LanguageModel:
    """A tiny Llama, wide enough for what a defence takes away."""
    tokenizer = word_tokenizer()
    shape = {"num_hidden_layers": 3, "num_attention_heads": 3, "hidden_size": 192, "initializer_range": 0.05}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    return random_model("wide", LlamaConfig(num_key_value_heads=1, intermediate_size=512, **tokens, **shape), tokenizer)


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_defended_update_gives_all_texts_and_proves_them(
    wide: LanguageModel, random_texts: Callable[..., list[str]], defence: str
) -> None:
    texts = random_texts(3, 1)
    found = attack(wide, defended(defence, client_update(wide, texts, [0, 1, 1])))
    assert_exact(found, truth(wide, texts), Status.CERTIFIED)
    assert sorted(label for labels in found.labels for label in labels) == [0, 1, 1]


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_text_with_one_other_word_explains_less(
    wide: LanguageModel, random_texts: Callable[..., list[str]], defence: str
) -> None:
    texts = random_texts(2, 3, shortest=8)
    sent = defended(defence, client_update(wide, texts, [0, 1]))
    true = sorted(truth(wide, texts), key=lambda ids: wide.text_of(ids) != texts[0])
    assert unexplained_share(wide, sent, true, [(0,), (1,)]) <= constants().certified
    other = (*true[0][:3], true[0][4], true[0][3], *true[0][5:])  # two words swapped
    assert unexplained_share(wide, sent, [other, true[1]], [(0,), (1,)]) > 100 * constants().certified


def test_too_few_entries_are_not_filled() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 60, generator=draw, dtype=torch.float64)  # of full rank
    assert filled(matrix * (torch.rand(60, 60, generator=draw) < 0.5)) is None


def test_an_update_as_it_is_is_neither_pruned_nor_on_a_grid(
    tiny_gpt2: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    evidence = evidence_of(tiny_gpt2, client_update(tiny_gpt2, random_texts(3, 2)))
    assert not evidence.pruned
    assert evidence.bits is None
