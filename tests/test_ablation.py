"""The table of ablations: every variant gets one update, only the textbook is told the batch size, counts are right."""

import json

import pytest

from dager_tutorial.cli import main
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation import ablation
from dager_tutorial.evaluation.ablation import TEXTBOOK, VARIANTS, WITHOUT, EncoderBenchmark, averages, bench_encoder
from dager_tutorial.evaluation.accuracy import AccuracyRun, Batch
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.budget import PARTS
from dager_tutorial.status import Status

TEXTS = ["the old man walks", "we had good tea today", "the cat saw a dog"]
LABELS = [0, 1, 0]
BATCH = Batch("words", 5, TEXTS, LABELS)


@pytest.fixture
def calls(monkeypatch):
    """What each attack was handed, in order: its name, the update and the options, and the answers still run."""
    handed = []
    for name in ("attack", "textbook_encoder_attack"):
        real = getattr(ablation, name)

        def spy(model, update, *, name=name, real=real, **options):
            handed.append((name, update, options))
            return real(model, update, **options)

        monkeypatch.setattr(ablation, name, spy)
    return handed


def test_all_variants_attack_one_update_and_only_the_textbook_is_told_the_batch_size(tiny_bert, calls):
    runs = list(bench_encoder(tiny_bert, [BATCH, Batch("words", 6, TEXTS[:2])], cap=321, time_budget=60))
    assert [(each.run.seed, each.variant) for each in runs] == [
        (seed, variant) for seed in (5, 6) for variant in VARIANTS
    ]
    assert len({id(update) for _, update, _ in calls}) == 2
    for each, (name, _, options) in zip(runs, calls, strict=True):
        if each.variant == TEXTBOOK:
            assert name == "textbook_encoder_attack"
            asked = options["options"]
            assert (asked.candidates_per_position, asked.cap, asked.remove_used) == (each.run.batch_size, 321, True)
            assert asked.time_budget == 60
        else:
            assert name == "attack"
            assert (options["config"].without, options["config"].time_budget) == (WITHOUT[each.variant], 60)
    full = runs[0].run
    assert (full.data, full.batch_size, full.exact, full.false, full.rouge1, full.status) == (
        "words", 3, 1.0, 0, 1.0, "texts_complete"
    )  # fmt: skip
    assert full.n_tokens == full.rows == sum(len(tiny_bert.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert not any(each.run.false for each in runs)
    record = runs[0].to_json()
    assert json.loads(json.dumps(record)) == record == full.to_json() | {"variant": "full"}


def test_every_part_of_the_search_has_a_variant_and_the_command_line_runs_all(tiny_bert, monkeypatch):
    assert sorted(WITHOUT.values(), key=sorted) == sorted([frozenset(), *({part} for part in PARTS)], key=sorted)
    asked = []
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_bert)
    monkeypatch.setattr(ablation, "bench_encoder", lambda *_, variants, **__: asked.extend(variants) or iter(()))
    assert main(["bench", "encoder", "--model", "tiny", "--data", "notes", "--batch-size", "1"]) == 0
    assert asked == list(VARIANTS)


def test_only_what_is_asked_for_runs_in_its_order_when_it_is_asked_for(tiny_bert, calls):
    stages = []
    runs = bench_encoder(
        tiny_bert, iter([BATCH]), variants=["textbook", "full"], progress=lambda stage, *_: stages.append(stage)
    )
    assert not calls
    assert next(runs).variant == "textbook" and len(calls) == 1
    assert [run.variant for run in runs] == ["full"]
    assert {"textbook: filter", "textbook: search", "full: filter", "full: search"} == set(stages)


def test_a_sequence_that_is_not_in_the_batch_is_counted(tiny_bert, monkeypatch):
    sequences = (tuple(tiny_bert.tokenizer(TEXTS[1])["input_ids"]), (7, 7), (8, 8))
    spoilt = Reconstruction(sequences, ("a", "b", "c"), (1.0,) * 3, Status.PARTIAL, seconds={"total": 1.0})
    for name in ("attack", "textbook_encoder_attack"):
        monkeypatch.setattr(ablation, name, lambda *_, **__: spoilt)
    runs = [each.run for each in bench_encoder(tiny_bert, [BATCH])]
    assert len(runs) == len(VARIANTS)
    for run in runs:
        assert (run.exact, run.false, run.status, run.seconds) == (pytest.approx(1 / 3), 2, "partial", 1.0)
        assert 1 / 3 <= run.rouge1 < 1


def test_averages_are_those_that_a_hand_gets():
    def run(data, size, variant, exact, seconds):
        numbers = {
            "seed": 0,
            "n_tokens": 9,
            "rows": 9,
            "status": "partial",
            "peak_rss_mb": 1.0,
            "rouge2": 0.0,
            "counted": 0.0,
            "labelled": 0.0,
        }
        scores = {"exact": exact, "rouge1": exact / 2, "false": 1}
        return EncoderBenchmark(variant, AccuracyRun(data=data, batch_size=size, seconds=seconds, **numbers, **scores))

    runs = [
        run("a", 2, "full", 1.0, 1.0),
        run("a", 2, "textbook", 0.5, 10.0),
        run("a", 2, "full", 0.5, 2.0),
        run("a", 4, "full", 0.25, 4.0),
        run("b", 2, "full", 0.0, 5.0),
    ]
    table = averages(runs)
    assert [(row.data, row.batch_size, row.variant, row.batches) for row in table] == [
        ("a", 2, "full", 2), ("a", 2, "textbook", 1), ("a", 4, "full", 1), ("b", 2, "full", 1)
    ]  # fmt: skip
    assert (table[0].exact, table[0].rouge1, table[0].seconds, table[0].false) == (0.75, 0.375, 1.5, 2)
    assert averages([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["full", "no luck"]}, "'no luck'.*no incidence"),
        ({"cap": 0}, "cap"),
        ({"time_budget": 0}, "time_budget"),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_any_batch_is_drawn(tiny_bert, options, message):
    with pytest.raises(DagerError, match=message):
        bench_encoder(tiny_bert, (pytest.fail("worked in vain") for _ in range(1)), **options)


def test_the_command_prints_a_line_a_run_a_table_and_writes_them(tiny_bert, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_bert)
    data, out = tmp_path / "words.tsv", tmp_path / "out.json"
    data.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in zip(TEXTS, LABELS, strict=True)))
    sizes = ["--batch-size", "1", "--batch-size", "2", "--batches", "2", "--seed", "3"]
    variants = ["--variant", "full", "--variant", "textbook", "--cap", "50"]
    options = ["--model", "tiny", "--data", str(data), *sizes, *variants]
    assert main(["bench", "encoder", *options, "--json", str(out)]) == 0
    record = json.loads(out.read_text("utf-8"))
    assert [(run["batch_size"], run["seed"], run["variant"]) for run in record["runs"]] == [
        (size, seed, variant) for size in (1, 2) for seed in (3, 4) for variant in ("full", "textbook")
    ]
    assert all(run["exact"] == 1 and run["false"] == 0 for run in record["runs"] if run["variant"] == "full")
    assert (record["cap"], record["time_budget"]) == (50, None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum("false=0" in line for line in lines) >= 4
    rows = [line for line in lines if line[:1] == ["words"] and len(line) == 7]
    assert [row[1:3] for row in rows] == [["1", "full"], ["1", "textbook"], ["2", "full"], ["2", "textbook"]]
    assert rows[0][3:6] == rows[2][3:6] == ["100.0", "100.0", "0"]
