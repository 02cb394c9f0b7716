"""Limits that no run can keep are refused; the others are kept wherever the time runs out, and what is known stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import every, truth
from hypothesis import given
from hypothesis import strategies as st

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server import budget
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import PARTS, AttackConfig, Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.run import recover_prefixes
from dager_tutorial.server.encoder.run import recover_texts
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.server.outcome import Outcome
from dager_tutorial.status import Certainty, Status
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]


@pytest.mark.parametrize(
    "field, value",
    [
        ("time_budget", 0),
        ("time_budget", -1.0),
        ("time_budget", math.nan),
        ("memory_mb", 1),
        ("memory_mb", 15),
        ("without", frozenset({"incidence", "luck"})),
    ],
)
def test_what_no_run_can_keep_is_refused(field: str, value: Any) -> None:
    with pytest.raises(DagerError, match=field) as caught:
        replace(AttackConfig(), **{field: value})
    assert "\n" not in str(caught.value)


def test_what_a_run_can_keep_is_not() -> None:
    assert AttackConfig(time_budget=1e-9, memory_mb=16, without=PARTS).without == PARTS
    assert AttackConfig(time_budget=math.inf).time_budget == math.inf


def test_a_budget_is_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int | None]] = []
    made = Budget.of(AttackConfig(seed=3, time_budget=5, memory_mb=20), 100.0, lambda *call: calls.append(call))
    assert (made.memory, made.deadline, made.seed) == (20 * 2**20, 105.0, 3)
    made.report("search", 2, 7)
    assert calls == [("search", 2, 7)]
    assert Budget.of(AttackConfig(), 100.0).deadline == math.inf
    Budget().report("search", 1)  # nobody listens
    for now, late in [(104.9, False), (105.0, False), (105.1, True)]:
        monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda now=now: now))
        assert made.late is late


@given(memory=st.integers(0, 2**40), each=st.integers(0, 2**40))
def test_chunks_fit_and_are_never_empty(memory: int, each: int) -> None:
    count = Budget(memory=memory).chunk(each)
    assert count == 1 or count * each <= memory
    assert (count + 1) * max(each, 1) > memory


def test_every_draw_of_a_seed_is_the_same() -> None:
    draws = [torch.rand(5, generator=Budget(seed=seed).generator()) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A clock that goes one second on whenever somebody asks whether it is late; what it shows is its only entry."""
    shown = [0]

    def ask() -> int:
        shown[0] += 1
        return shown[0]

    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=ask))
    yield shown


def recover(evidence: Evidence, deadline: float) -> Outcome:
    causal = isinstance(evidence.adapter, DecoderAdapter)
    return (recover_prefixes if causal else recover_texts)(evidence, Budget(deadline=deadline))


CASES = [
    ("tiny_gpt2", 3, "float32"),
    ("tiny_gpt2", 3, "bfloat16"),
    ("tiny_gpt2", 16, "float32"),  # by leverage
    ("tiny_llama", 3, "float32"),
    ("tiny_llama_bos", 3, "bfloat16"),
    ("tiny_llama", 16, "float32"),
    ("tiny_bert", 3, "float32"),
    ("tiny_roberta", 3, "float32"),
]


@pytest.mark.parametrize("model, size, dtype", CASES, indirect=["model"])
def test_wherever_the_time_runs_out_the_run_ends_and_claims_nothing_false(
    model: LanguageModel, size: int, dtype: str, random_texts: Draw, checks: list[int]
) -> None:
    """At a dozen of all moments at which a stage looks at the clock: it looks a few times more, and no longer works."""
    texts = random_texts(size, 8, 8, 8) if size > 3 else random_texts(size, 8)
    evidence = evidence_of(model, client_update(model, texts, config=ClientConfig(dtype=dtype)))
    whole, true = recover(evidence, math.inf), truth(model, texts)
    end = checks[0]
    for deadline in sorted({0, 1, end - 1, *range(2, end, max(1, end // 9))}):
        checks[0] = 0
        found = recover(evidence, deadline + 0.5)
        assert checks[0] - deadline <= constants().filter_positions + 8, "a stage goes on beyond the deadline"
        assert found.status in {Status.OUT_OF_TIME, whole.status} and found.diagnosis
        assert len(found.texts) <= size
        sure = {each.tokens for each in found.texts if each.confirmation.certainty is Certainty.WHOLE}
        assert sure <= true
        if found.status is whole.status:
            assert found == whole
    assert deadline == end - 1 and recover(evidence, math.inf) == whole


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
def test_no_time_at_all(model: LanguageModel, random_texts: Draw) -> None:
    found = attack(model, client_update(model, random_texts(2, 8)), config=AttackConfig(time_budget=1e-9))
    assert (found.status, found.sequences) == (Status.OUT_OF_TIME, ())
    assert "time budget" in found.diagnosis


@every("tiny_gpt2", "tiny_bert")
def test_an_update_that_says_nothing_is_no_matter_of_time(model: LanguageModel) -> None:
    update = client_update(model, ["the dog is good"])
    zeros = Update({name: torch.zeros_like(tensor) for name, tensor in update.gradients.items()})
    assert attack(model, zeros, config=AttackConfig(time_budget=1e-9)).status is Status.NO_SIGNAL


def test_a_generous_budget_changes_nothing(tiny_gpt2: LanguageModel, random_texts: Draw) -> None:
    update = client_update(tiny_gpt2, random_texts(2, 8))
    begin = time.perf_counter()
    assert not Budget.of(AttackConfig(time_budget=1e9), begin).late
    runs = [attack(tiny_gpt2, update, config=AttackConfig(time_budget=limit)) for limit in (None, 1e9)]
    assert runs[0].sequences == runs[1].sequences and runs[0].status is runs[1].status is Status.CERTIFIED
