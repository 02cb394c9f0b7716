"""Quadratic forms of all pairs against the vectors of each."""

from __future__ import annotations

import pytest
import torch
from helpers import every

from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.pairs import Forms

ALL = ("tiny_gpt2", "shaken_gpt2", "tiny_bert", "shaken_bert", "tiny_llama")


@every(*ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [2**29, 2**14], ids=["kept", "computed again"])
def test_forms_are_those_of_the_vectors(model: LanguageModel, dtype: torch.dtype, memory: int) -> None:
    source = adapter_for(model.network).first_input
    width, draw = source.tokens.shape[1], torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(width, 9, generator=draw, dtype=torch.float64)).Q
    weights = 10 ** torch.linspace(0, 6, 9, dtype=torch.float64)
    forms = Forms(source, directions.to(dtype), weights.to(dtype), Budget(memory=memory))
    places = torch.zeros(1, width) if source.positions is None else source.positions[3:8]
    seen = 0
    for pairs in forms.at(places):
        tokens = torch.arange(pairs.start, pairs.start + len(pairs.size))
        for index in range(len(places)):
            at = torch.full_like(tokens, 3 + index)
            vectors = source.vectors(tokens, at).double()
            torch.testing.assert_close(pairs.size[:, index].double(), vectors.square().sum(1), rtol=1e-4, atol=1e-6)
            inside = (vectors @ directions).square()
            for form, wanted in ((pairs.inside, inside.sum(1)), (pairs.leverage, inside @ weights)):
                off = (form.values[:, index].double() - wanted).abs()
                assert bool((off <= 2 * form.errors[:, index].double() + 1e-5 * wanted).all())
        seen += len(tokens)
    assert seen == len(source.tokens)


def test_no_part_is_begun_when_the_time_is_spent(tiny_gpt2: LanguageModel) -> None:
    source = adapter_for(tiny_gpt2.network).first_input
    directions = torch.eye(source.tokens.shape[1])
    forms = Forms(source, directions, torch.ones(len(directions)), Budget(deadline=0.0))
    assert list(forms.at(source.tokens.new_zeros(1, len(directions)))) == []
