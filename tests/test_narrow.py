"""A trained adapter that is narrower than a text is long: only the text itself explains its directions."""

from __future__ import annotations

import pytest
import torch
from helpers import WORDS, every, truth

from dager_tutorial.client.adapters import LoraConfig, hand_out
from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.decoder.narrow.wanted import Explained, Wanted
from dager_tutorial.status import Certainty, Status

PUBLIC = [" ".join(WORDS[start : start + 5]) for start in range(0, 200, 5)]
TEXT = "we listen to the old river and my father never knew her"


def narrow(model: LanguageModel, steps: int = 2) -> LanguageModel:
    return hand_out(model, LoraConfig(rank=6, steps=steps), texts=PUBLIC)


def test_rows_explain_directions_that_none_of_them_lies_in() -> None:
    draw = torch.Generator().manual_seed(0)
    stretched = torch.diag(torch.logspace(0, 2, 60)) @ torch.randn(60, 60, generator=draw)
    rows, others, usual = (torch.randn(count, 60, generator=draw) @ stretched for count in (10, 10, 400))
    gradient = torch.randn(4, 10, generator=draw).double() @ rows.double()
    first = Explained.nothing(Wanted.of(gradient.float().double(), usual, 2.0**-23))
    here = torch.zeros(10, dtype=torch.long)
    assert first.gains(rows, here).mean() > 3 * first.gains(others, here).mean()
    true = wrong = first
    for index in range(10):
        place = torch.zeros(1, dtype=torch.long)
        exact = true.left() - true.grown(rows[index : index + 1], place).left()
        assert exact > 0
        true = true.grown(rows[index : index + 1], place)
        wrong = wrong.grown((others if index == 4 else rows)[index : index + 1], place)
    assert true.left() < 1e-4 < 0.1 < wrong.left()
    assert true.grown(rows[:1], torch.zeros(1, dtype=torch.long)).left() == pytest.approx(true.left().item(), abs=1e-5)


@every("tiny_gpt2", "tiny_llama")
def test_one_text_comes_back_from_fewer_directions_than_it_has_rows(model: LanguageModel) -> None:
    known = narrow(model)
    found = attack(known, client_update(known, [TEXT]))
    assert set(found.sequences) == truth(model, [TEXT])
    assert found.status.rows_explained and found.confirmations[0].certainty is not Certainty.GUESS


@every("tiny_gpt2", "tiny_llama")
@pytest.mark.parametrize(("texts", "steps"), [([TEXT, "cup young snow never listen to the wind"], 2), ([TEXT], 0)])
def test_where_more_is_hidden_nothing_is_confirmed(model: LanguageModel, texts: list[str], steps: int) -> None:
    known = narrow(model, steps)
    found = attack(known, client_update(known, texts))
    assert found.status is Status.SATURATED
    assert not set(found.confirmed) - truth(model, texts)
