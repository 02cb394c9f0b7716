"""The commands that measure: what they hand on, print and write; the measuring itself has tests of its own."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from dager_tutorial.cli import main
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.evaluation import ablation, scaling
from dager_tutorial.evaluation.ablation import EncoderBenchmark
from dager_tutorial.evaluation.accuracy import AccuracyRun, Batch
from dager_tutorial.evaluation.scaling import ScalingRun


@pytest.fixture
def zoo(tiny_llama, monkeypatch):
    """A zoo of one tiny model, whatever name is asked for."""
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_llama)


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_bench_hands_on_its_options_and_writes_the_record(zoo, tmp_path, capsys, monkeypatch):
    record = {"textbook_seconds": None, "fast_seconds": 0.25, "ratio": None, "same_sentences": None}
    calls = []

    def bench_decoder(model, texts, labels, *, textbook=True, progress=None):
        calls.append((len(texts), len(labels), textbook))
        return SimpleNamespace(to_json=lambda: record)

    monkeypatch.setitem(sys.modules, "dager_tutorial.evaluation.bench", SimpleNamespace(bench_decoder=bench_decoder))
    arguments = ["bench", "decoder", "--model", "tiny", "--data", "notes", "--batch-size", "3"]
    assert main([*arguments, "--no-textbook", "--json", str(tmp_path / "bench.json")]) == 0
    assert main(arguments) == 0
    assert calls == [(3, 3, False), (3, 3, True)]
    assert read(tmp_path / "bench.json") == record
    assert "fast seconds" in capsys.readouterr().out


def test_bench_accuracy_hands_on_batches_and_client_and_prints_as_it_goes(zoo, tmp_path, capsys, monkeypatch):
    told = {}
    run = AccuracyRun("notes", 2, 4, 30, 29, 0.5, 0.5, 0.25, 1, 0.75, 0.7, "partial", 1.25, 100.0)

    def bench_accuracy(model, batches, *, config, progress):
        told.update(batches=list(batches), config=config)
        yield run
        assert "notes  B=2  seed=4  rows=29  exact=0.500  false=1  R1=0.750  partial  1.2 s" in capsys.readouterr().out
        yield run

    fake = SimpleNamespace(Batch=Batch, bench_accuracy=bench_accuracy)
    monkeypatch.setitem(sys.modules, "dager_tutorial.evaluation.accuracy", fake)
    arguments = ["bench", "accuracy", "--model", "tiny", "--data", "notes", "--batch-size", "2", "--batches", "3"]
    options = ["--seed", "4", "--task", "next_token", "--dtype", "bfloat16", "--json", str(tmp_path / "runs.json")]
    assert main([*arguments, *options]) == 0
    assert [(batch.data, batch.seed, len(batch.texts)) for batch in told["batches"]] == [
        ("notes", s, 2) for s in (4, 5, 6)
    ]
    assert told["config"] == ClientConfig(task="next_token", dtype="bfloat16", share="attention")
    written = read(tmp_path / "runs.json")
    assert (written["task"], written["dtype"], written["runs"]) == ("next_token", "bfloat16", [run.to_json()] * 2)


def test_bench_scaling_draws_growing_batches_and_shows_stages(zoo, tmp_path, capsys, monkeypatch):
    sizes = []

    def bench_scaling(model, batches, *, progress):
        sizes.append([len(texts) for texts, labels in batches if len(texts) == len(labels)])
        for rows, seconds in ((28, 3.5), (56, 14.0)):
            stages = {"subspace": seconds / 2, "filter": 0.5, "search": 0.0}
            yield ScalingRun("tiny", 2, 30, rows, 16, seconds, seconds, stages, 0.5, "texts_complete", 100.0, 1)

    monkeypatch.setattr(scaling, "bench_scaling", bench_scaling)
    arguments = ["bench", "scaling", "--model", "tiny", "--data", "notes", "--json", str(tmp_path / "runs.json")]
    assert main([*arguments, "--picture", str(tmp_path / "growth.png")]) == 0
    assert main([*arguments, "--batch-size", "3", "--batch-size", "5"]) == 0
    assert sizes == [[1, 2, 4, 8, 16, 32], [3, 5]]
    told = read(tmp_path / "runs.json")
    assert told["model"] == "tiny" and len(told["runs"]) == 2
    assert told["growth"] == pytest.approx({"subspace": 2.0, "filter": 0.0, "search": None, "total": 2.0})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = ["2", "28", "1.75", "0.50", "0.00", "3.50", "125.0", "50.0", "texts_complete"]
    assert rows.count(first) == 2 and rows.count(["rows^", "2.00", "0.00", "2.00"]) == 2
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, said", [("growth.txt", "is no picture"), ("absent/growth.png", "absent")])
def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(name, said, tmp_path, capsys):
    arguments = ["bench", "scaling", "--model", "nowhere", "--data", "notes", "--picture", str(tmp_path / name)]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_bench_encoder_hands_on_its_limits_and_shows_means(zoo, tmp_path, capsys, monkeypatch):
    told = {}
    runs = [
        EncoderBenchmark(
            variant, AccuracyRun("notes", 2, seed, 30, 29, exact, exact, exact, 1, 0.75, 0.7, "partial", 2.0, 100.0)
        )
        for variant, seed, exact in (("full", 0, 1.0), ("full", 1, 0.5), ("textbook", 0, 0.0))
    ]

    def bench_encoder(model, batches, **options):
        told.update(options, seeds=[batch.seed for batch in batches])
        yield from runs

    monkeypatch.setattr(ablation, "bench_encoder", bench_encoder)
    arguments = ["bench", "encoder", "--model", "tiny", "--data", "notes", "--batch-size", "2", "--batches", "2"]
    limits = ["--variant", "full", "--variant", "textbook", "--cap", "50", "--time-budget", "1.5"]
    assert main([*arguments, *limits, "--json", str(tmp_path / "runs.json")]) == 0
    assert callable(told.pop("progress"))
    assert told == {"variants": ["full", "textbook"], "cap": 50, "time_budget": 1.5, "seeds": [0, 1]}
    written = read(tmp_path / "runs.json")
    assert written == {"model": "tiny", "cap": 50, "time_budget": 1.5, "runs": [run.to_json() for run in runs]}
    lines = capsys.readouterr().out.splitlines()
    assert "notes  B=2  seed=1  rows=29  exact=0.500  false=1  R1=0.750  partial  2.0 s  full" in lines
    rows = [line.split() for line in lines]
    assert ["notes", "2", "full", "75.0", "75.0", "2", "2.00"] in rows
    assert ["notes", "2", "textbook", "75.0", "0.0", "1", "2.00"] in rows
    assert main(arguments) == 0
    assert (told["variants"], told["cap"], told["time_budget"]) == (ablation.VARIANTS, ablation.CAP, None)
