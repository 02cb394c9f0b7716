"""Updates that were pruned or rounded to a grid: recovered, and confirmed only by what was sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_exact, random_model, truth, word_tokenizer
from torch import Tensor
from transformers import LlamaConfig

from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.completion.certificate import unexplained_share
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.missing.filling import filled
from dager_tutorial.status import Status
from dager_tutorial.update import Update

Defence = Callable[[Tensor], Tensor]


def kept(share: float) -> Defence:
    """Top-k pruning: the largest entries of a tensor stay."""

    def prune(tensor: Tensor) -> Tensor:
        least = tensor.abs().flatten().topk(max(1, int(share * tensor.numel()))).values[-1]
        return torch.where(tensor.abs() >= least, tensor, 0.0)

    return prune


def rounded(*, by_chance: bool) -> Defence:
    """Eight bits: entries become multiples of a step, the nearest or by chance."""
    generator = torch.Generator().manual_seed(0)

    def round_off(tensor: Tensor) -> Tensor:
        step = (tensor.abs().max() / 127).clamp(min=1e-30)
        if not by_chance:
            return (tensor / step).round() * step
        return (tensor / step + torch.rand(tensor.shape, generator=generator)).floor().clamp(-127, 127) * step

    return round_off


DEFENCES = {
    "half": kept(0.5),
    "third": kept(0.3),
    "nearest": rounded(by_chance=False),
    "by chance": rounded(by_chance=True),
}


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
    sent = {name: DEFENCES[defence](each) for name, each in client_update(wide, texts, [0, 1, 1]).gradients.items()}
    found = attack(wide, Update(sent))
    assert_exact(found, truth(wide, texts), Status.CERTIFIED)
    assert sorted(label for labels in found.labels for label in labels) == [0, 1, 1]


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_text_with_one_other_word_explains_less(
    wide: LanguageModel, random_texts: Callable[..., list[str]], defence: str
) -> None:
    texts = random_texts(2, 3, shortest=8)
    sent = {name: DEFENCES[defence](each) for name, each in client_update(wide, texts, [0, 1]).gradients.items()}
    true = sorted(truth(wide, texts), key=lambda ids: wide.text_of(ids) != texts[0])
    assert unexplained_share(wide, Update(sent), true, [(0,), (1,)]) <= constants().certified
    other = (*true[0][:3], true[0][4], true[0][3], *true[0][5:])  # two words swapped
    assert unexplained_share(wide, Update(sent), [other, true[1]], [(0,), (1,)]) > 100 * constants().certified


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
