"""How well extensions fit where no gap stands below the signal."""

from __future__ import annotations

import torch
from helpers import every

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import MLP, QKV
from dager_tutorial.server.budget import AttackConfig, Budget
from dager_tutorial.server.constants import varied
from dager_tutorial.server.decoder.passage import Passage
from dager_tutorial.server.decoder.ranking import Ranking

TOKENS = torch.tensor([3, 5, 8, 13])


def _ranking(model: LanguageModel) -> Ranking:
    """Two taps, of each the vector's first entry for a misfit."""
    adapter, budget = adapter_for(model.network), Budget.of(AttackConfig(), 0.0)
    assert isinstance(adapter, DecoderAdapter)
    readers = dict.fromkeys((adapter.tap(0, MLP), adapter.tap(1, QKV)), lambda vectors: vectors[:, :1])
    return Ranking(Passage(adapter, readers, budget, blocks=1), TOKENS, budget.generator())


@every("tiny_gpt2", "tiny_llama")
def test_what_a_token_does_behind_any_prefix_is_no_evidence(model: LanguageModel) -> None:
    ranking = _ranking(model)
    passage = ranking.passage
    first = passage.through(passage.enter(torch.zeros(4, dtype=torch.long), TOKENS, 0), passage.empty(), 2)
    assert torch.equal(ranking.misfits(first), first.features())  # a first place is like nothing else
    cache, tokens = passage.grown(passage.empty(), first), torch.tensor([3, 5, 8, 13, 21])
    own = torch.stack([
        ranking.misfits(rows) - rows.features()
        for place in range(4)
        for rows in [passage.through(passage.enter(torch.full((5,), place), tokens, 1), cache, 2)]
    ])  # fmt: skip
    assert own.shape == (4, 5, 2)
    torch.testing.assert_close(own, own[:1].expand_as(own), rtol=0, atol=1e-6)  # the same behind every prefix
    assert not own[:, 4].any()  # a token that is not among the batch's
    torch.testing.assert_close((-own[0, :4]).median(0).values, torch.zeros(2), rtol=0, atol=1e-6)  # beyond the median
    assert own[0, :4].abs().min(1).values.max() > 0


@every("tiny_gpt2", "tiny_llama")
def test_where_no_extension_is_left_none_goes_on(model: LanguageModel) -> None:
    passage = _ranking(model).passage
    nobody = torch.zeros(0, dtype=torch.long)
    rows = passage.through(passage.enter(nobody, nobody, 0), passage.empty(), passage.halves)
    assert rows.features().shape == (0, 2)


def test_where_tokens_are_too_many_nothing_is_told_of_them(tiny_gpt2: LanguageModel) -> None:
    ranking = _ranking(tiny_gpt2)
    passage = ranking.passage
    first = passage.through(passage.enter(torch.zeros(4, dtype=torch.long), TOKENS, 0), passage.empty(), 2)
    second = passage.enter(torch.arange(4), TOKENS, 1)
    second = passage.through(second, passage.grown(passage.empty(), first), 2)
    with varied(familiar_rows=3):
        assert torch.equal(ranking.misfits(second), second.features())
