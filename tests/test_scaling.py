"""What scaling measures of real batches; the exponents against known powers."""

from __future__ import annotations

import pytest
from helpers import every
from hypothesis import given
from hypothesis import strategies as st

from dager_tutorial.evaluation.scaling import bench_scaling, exponent
from dager_tutorial.models.language_model import LanguageModel

TEXTS = ["the dog is good", "the old cat wants milk", "we want more"]


@every("tiny_gpt2", "tiny_bert")
def test_each_batch_is_measured(model: LanguageModel) -> None:
    stages: list[str] = []
    batches = [(TEXTS[:size], [0, 1, 0][:size]) for size in (1, 2, 3)]
    runs = list(bench_scaling(model, batches, progress=lambda stage, *_: stages.append(stage)))
    assert [run.batch_size for run in runs] == [1, 2, 3]
    assert all(run.exact == 1.0 and run.status == "texts_complete" for run in runs)
    assert all(0 < sum(run.stage_seconds.values()) <= run.seconds for run in runs)
    assert set(stages) == {"attack: filter", "attack: search"}
    framed = 0 if runs[0].rows == runs[0].n_tokens and model.network.config.model_type == "gpt2" else 2
    assert runs[0].rows == 4 + framed
    assert runs[1].rows == runs[1].n_tokens - (framed == 0)  # "the" begins two texts


@given(
    power=st.floats(-1, 4),
    factor=st.floats(0.1, 10),
    sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True),
)
def test_a_power_is_found_again(power: float, factor: float, sizes: list[int]) -> None:
    times = [factor * (1 + 1e3 * size**power) for size in sizes]
    straight = [1e3 * factor * (size / min(sizes)) ** abs(power) for size in sizes]
    assert exponent(sizes, straight) == pytest.approx(abs(power), abs=1e-6)
    assert exponent(sizes, [0.0] * len(sizes)) is None and exponent(sizes[:1], times[:1]) is None
