"""Stages that interrupt each other add up to the time that passed, by a clock of our own."""

from __future__ import annotations

import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dager_tutorial import stopwatch
from dager_tutorial.stopwatch import Stopwatch, peak_memory_mb


class Clock:
    """Shows what it is wound to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


def started(clock: Clock) -> Stopwatch:
    return Stopwatch(begin=clock.now, _since=clock.now)


def test_a_stage_inside_another_interrupts_it(clock: Clock) -> None:
    watch = started(clock)
    clock.now += 1
    with watch.stage("search"):
        clock.now += 2
        with watch.stage("subspace"):
            clock.now += 4
            with watch.stage("search"):  # a stage may come back inside
                clock.now += 8
            clock.now += 16
        clock.now += 32
    clock.now += 64
    assert watch.report("filter", "search", "subspace") == {
        "filter": 0.0,
        "search": 2 + 8 + 32,
        "subspace": 4 + 16,
        "total": 127.0,
    }


def test_an_error_ends_its_stages(clock: Clock) -> None:
    watch = started(clock)
    with pytest.raises(KeyError), watch.stage("search"):
        clock.now += 1
        with watch.stage("subspace"):
            clock.now += 2
            raise KeyError
    clock.now += 4
    with watch.stage("filter"):
        clock.now += 8
    assert watch.seconds == {"search": 1.0, "subspace": 2.0, "filter": 8.0}


steps = st.recursive(st.integers(0, 9), lambda inner: st.tuples(st.sampled_from("abc"), st.lists(inner, max_size=4)))


@given(st.lists(steps, max_size=5))
def test_stages_add_up_to_the_time_spent_in_any(program: list) -> None:
    """Programs of waits (numbers) and stages (a name and what happens inside), nested at will."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        watch = started(clock)
        inside: dict[str, float] = {}
        _run(program, watch, clock, inside, None)
        assert {name: seconds for name, seconds in watch.seconds.items() if seconds} == inside
        total = watch.report()["total"]
    assert total == clock.now - 100 and sum(inside.values()) <= total


def _run(program: list, watch: Stopwatch, clock: Clock, inside: dict[str, float], stage: str | None) -> None:
    for step in program:
        if isinstance(step, int):
            clock.now += step
            if stage is not None and step:
                inside[stage] = inside.get(stage, 0.0) + step
            continue
        with watch.stage(step[0]):
            _run(step[1], watch, clock, inside, step[0])


def test_the_real_clock_is_the_one_of_the_budget() -> None:
    before, watch = time.perf_counter(), Stopwatch()
    assert before <= watch.begin <= time.perf_counter()


def test_peak_memory_rises_with_what_is_held_and_never_falls() -> None:
    before, now = peak_memory_mb(), psutil.Process().memory_info().rss / 2**20
    held = torch.ones(int(before - now + 100) * 2**18)  # 100 megabytes above the peak so far, all of them touched
    after = peak_memory_mb()
    assert before + 90 < after < before + 200
    del held
    assert peak_memory_mb() >= after
