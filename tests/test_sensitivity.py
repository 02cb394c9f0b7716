"""The benchmark of constants: one set of batches, each constant changed in turn, counts against the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dager_tutorial.cli import main
from dager_tutorial.client.step import play
from dager_tutorial.evaluation import sensitivity
from dager_tutorial.evaluation.sensitivity import Case, bench_sensitivity, changed, markdown_table
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.constant_table import ConstantRecord, constant_table
from dager_tutorial.server.constants import Constants, constants

TABLE = [record for record in constant_table() if record.name in ("model_error", "failures")]


@pytest.fixture
def cases(tiny_gpt2: LanguageModel, tiny_bert: LanguageModel, random_texts: Callable[..., list[str]]) -> list[Case]:
    models = {"a decoder": tiny_gpt2, "an encoder": tiny_bert}
    return [Case(name, model, *play(model, random_texts(2, 4))) for name, model in models.items()]


def test_every_constant_is_halved_and_doubled_and_nothing_stays_changed(cases: list[Case]) -> None:
    usual, *runs = bench_sensitivity(cases, TABLE)
    assert (usual.constant, usual.exact, usual.texts, usual.false, usual.changed) == ("", 4, 4, 0, ())
    assert [(run.constant, run.value) for run in runs] == [
        ("model_error", 2.0), ("model_error", 8.0), ("failures", 20), ("failures", 80)
    ]  # fmt: skip
    assert all((run.exact, run.false_confirmed) == (4, 0) for run in runs)
    assert constants() == Constants()


def test_what_a_constant_breaks_is_counted_and_named(cases: list[Case]) -> None:
    """A bound far below 1 rejects every true row."""
    broken = [ConstantRecord("model_error", 1e-6, "", "")]
    _, half, double = bench_sensitivity(cases, broken)
    for run in (half, double):
        assert (run.exact, run.changed) == (0, ("a decoder", "an encoder"))


def test_the_table_has_a_row_a_constant_and_says_what_changed(cases: list[Case]) -> None:
    runs = list(bench_sensitivity(cases, TABLE))
    lines = markdown_table(runs).splitlines()
    assert len(lines) == 2 + len(TABLE)
    assert lines[2].startswith("| `model_error` | 4 |")


def test_whole_numbers_stay_whole_and_above_zero() -> None:
    for record in constant_table():
        for factor in (0.5, 2.0):
            value = changed(record.value, factor)
            assert type(value) is type(record.value) and value > 0


def test_the_command_prints_a_line_a_run_and_writes_both_files(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sensitivity, "usual_cases", lambda: cases)
    monkeypatch.setattr(sensitivity, "constant_table", lambda: TABLE)
    files = tmp_path / "runs.json", tmp_path / "table.md"
    assert main(["bench", "sensitivity", "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    runs = json.loads(files[0].read_text("utf-8"))["runs"]
    assert [run["constant"] for run in runs] == ["", "model_error", "model_error", "failures", "failures"]
    assert files[1].read_text("utf-8").count("`") == 4
    assert "model_error = 2  exact=4/4  false=0" in capsys.readouterr().out
