"""The look at an update before any attack: a row for each tap that was shared, and nothing that JSON cannot hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from helpers import every
from torch import Tensor

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import UpdateError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV
from dager_tutorial.server.attack import attack
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.inspection import Inspection, TapReport, inspect_update, prospects
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]


@every("tiny_gpt2", "tiny_llama", "tiny_bert", "tiny_distilbert")
def test_every_shared_tap_has_a_row_that_agrees_with_the_attack(model: LanguageModel, random_texts: Draw) -> None:
    update = client_update(model, random_texts(2, 4))
    inspection, adapter = inspect_update(model, update), adapter_for(model.network)
    assert [row.tap for row in inspection.rows] == adapter.taps()
    assert inspection.verdict == prospects(evidence_of(model, update)) and inspection.verdict.startswith("exposed")
    gradients, ranks = update.for_backbone(model.network), attack(model, update).ranks
    for row in inspection.rows:
        gradient = row.tap.gradient(gradients)
        assert gradient is not None and row.shape == tuple(gradient.shape)
        assert row.rank == ranks.get(row.tap, row.rank) and not row.saturated
        assert row.gap > 100 and 0 < row.noise_floor < 1e-6  # float32
    assert {row.tap for row in inspection.rows} & set(ranks)


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
def test_without_block_0_s_attention_it_says_whether_the_search_begins_with_names(model: LanguageModel) -> None:
    gradients = client_update(model, ["we listen to the river"]).gradients
    first = set(adapter_for(model.network).tap(0, QKV).parameters)
    left = {name: each for name, each in gradients.items() if not any(name.endswith(one) for one in first)}
    bare = {name: each for name, each in left.items() if "embed" not in name and not name.endswith("wte.weight")}
    said, bare_said = (inspect_update(model, Update(each)).verdict for each in (left, bare))
    assert "missing" in said and "missing" in bare_said and "begin" not in bare_said
    assert ("5 tokens" in said) == ("bert" not in model.name)


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
@pytest.mark.parametrize("level", [1e-6, 1e-5])
def test_the_noise_floor_is_the_noise_that_was_added(model: LanguageModel, level: float, random_texts: Draw) -> None:
    update, adapter = client_update(model, random_texts(2, 4)), adapter_for(model.network)
    generator = torch.Generator().manual_seed(0)
    outputs_first = not adapter.input_first

    def noised(gradient: Tensor) -> Tensor:
        """Noise in proportion to each output's gradient."""
        size = gradient.square().mean(1 if outputs_first else 0, keepdim=True).sqrt() if gradient.ndim == 2 else 0
        return gradient + level * size * torch.randn(gradient.shape, generator=generator)

    spoilt = Update({name: noised(gradient) for name, gradient in update.gradients.items()})
    for before, row in zip(inspect_update(model, update).rows, inspect_update(model, spoilt).rows, strict=True):
        assert row.noise_floor == pytest.approx(level, rel=0.25), row.tap.name
        assert row.gap < before.gap


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
def test_what_was_not_shared_has_no_row_and_what_is_zero_has_rank_zero(model: LanguageModel) -> None:
    texts = ["the dog is good", "a cat"]
    shared = inspect_update(model, client_update(model, texts, config=ClientConfig(share="attention")))
    assert {row.tap.kind for row in shared.rows} == {QKV, ATTENTION_OUTPUT}
    whole = client_update(model, texts).gradients
    gone = adapter_for(model.network).tap(1, QKV)
    update = Update({name: x * 0 if name.endswith(gone.parameters) else x for name, x in whole.items()})
    (row,) = [row for row in inspect_update(model, update).rows if row.tap == gone]
    assert (row.rank, row.noise_floor, row.gap, row.saturated) == (0, 0.0, 1.0, False)


@every("tiny_gpt2", "tiny_bert")
def test_a_full_tap_is_called_saturated(model: LanguageModel, random_texts: Draw) -> None:
    inspection = inspect_update(model, client_update(model, random_texts(12, 5, 8, 8)))
    full = {row.tap for row in inspection.rows if row.saturated}
    assert full and all(row.rank >= 0.9 * row.shape[1] for row in inspection.rows if row.saturated)
    assert "saturated" in inspection.verdict


def test_the_record_is_strict_json(tiny_gpt2: LanguageModel) -> None:
    exact = inspect_update(tiny_gpt2, client_update(tiny_gpt2, ["a cat"], config=ClientConfig(dtype="float64")))
    tap = exact.rows[0].tap
    rows = (*exact.rows, TapReport(tap, (7, 3), 3, 1e-7, math.inf, saturated=True))
    record = json.loads(json.dumps(Inspection(rows, "said").to_json(), allow_nan=False))
    assert record["verdict"] == "said" and len(record["rows"]) == len(rows)
    assert record["rows"][-1] == {
        "name": "block 0 query, key, value",
        "shape": [7, 3],
        "rank": 3,
        "noise_floor": 1e-7,
        "gap": None,
        "saturated": True,
    }
    assert [row["gap"] for row in record["rows"][:-1]] == [row.gap for row in exact.rows]


def test_a_stranger_s_update_is_refused(tiny_gpt2: LanguageModel, tiny_bert: LanguageModel) -> None:
    with pytest.raises(UpdateError, match="name the model that the client used"):
        inspect_update(tiny_bert, client_update(tiny_gpt2, ["a cat"]))
