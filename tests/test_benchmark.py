"""The benchmark: both attacks on one update, counts that can be checked by hand, and its two commands."""

import json

import pytest

from dager_tutorial.evaluation import bench
from dager_tutorial.evaluation.bench import bench_accuracy, bench_decoder, bench_scaling, distinct_prefixes
from dager_tutorial.cli.app import main
from dager_tutorial.client.step import encode, masked_inputs
from dager_tutorial.errors import DagerError
from dager_tutorial.reconstruction import Reconstruction

TEXTS = ["the old man walks to the sea", "the old dog sleep", "we had good tea"]
LABELS = [0, 1, 0]


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def model(request):
    return request.getfixturevalue(request.param)


def test_both_attacks_get_the_same_update_and_find_the_same_texts(model, monkeypatch):
    updates = []
    for name in ("attack", "textbook_attack"):
        real = getattr(benchmark, name)

        def spy(given, update, real=real, **options):
            updates.append(update)
            return real(given, update, **options)

        monkeypatch.setattr(benchmark, name, spy)
    record = bench_decoder(model, TEXTS, LABELS)
    assert updates[0] is updates[1]
    assert (record.exact, record.textbook_exact, record.same_sentences) == (1.0, 1.0, True)
    assert (record.batch_size, record.n_tokens, record.hidden_size) == (3, 7 + 4 + 4, 64)
    assert record.distinct_prefixes == 7 + 2 + 4  # "the" and "the old" begin two texts
    assert record.ratio == record.textbook_seconds / record.fast_seconds
    assert json.loads(json.dumps(record.to_json())) == record.to_json()


def test_without_the_textbook_version_its_fields_are_empty(tiny_gpt2):
    record = bench_decoder(tiny_gpt2, TEXTS, LABELS, textbook=False)
    fields = ("textbook_seconds", "ratio", "same_sentences", "textbook_exact")
    assert [record.to_json()[name] for name in fields] == [None] * 4
    assert record.exact == 1.0


def test_a_sentence_that_only_one_attack_finds_is_told(tiny_gpt2, monkeypatch):
    real = benchmark.textbook_attack
    monkeypatch.setattr(
        benchmark,
        "textbook_attack",
        lambda *given, **options: real(*given, span_threshold_0=1e-12, **options),
    )
    record = bench_decoder(tiny_gpt2, TEXTS, LABELS)
    assert (record.exact, record.textbook_exact, record.same_sentences) == (1.0, 0.0, False)


def test_scaling_measures_each_batch(tiny_gpt2):
    stages = []
    batches = [(TEXTS[:size], LABELS[:size]) for size in (1, 2, 3)]
    records = bench_scaling(tiny_gpt2, batches, progress=lambda stage, *_: stages.append(stage))
    assert [record.batch_size for record in records] == [1, 2, 3]
    assert [record.n_tokens for record in records] == [7, 11, 15]
    assert all(record.textbook_seconds is None and record.exact == 1.0 for record in records)
    assert {"attack: filter", "attack: search"} == set(stages)


def test_commands_write_records(tiny_llama, tmp_path, capsys):
    tiny_llama.network.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    data, out = tmp_path / "texts.tsv", tmp_path / "out.json"
    data.write_text("label\ttext\n" + "".join(f"{i % 2}\t{text}\n" for i, text in enumerate(TEXTS)), "utf-8")
    options = ["--model", str(tmp_path / "model"), "--data", str(data), "--json", str(out)]
    assert main(["bench", "decoder", *options, "--batch-size", "3"]) == 0
    record = json.loads(out.read_text("utf-8"))
    assert record["same_sentences"] is True and record["exact"] == 1
    assert record["textbook_seconds"] > 0 and record["fast_seconds"] > 0 and record["ratio"] > 0
    assert main(["bench", "scaling", *options, "--batch-size", "1", "--batch-size", "3"]) == 0
    runs = json.loads(out.read_text("utf-8"))["runs"]
    assert [run["batch_size"] for run in runs] == [1, 3]
    assert "100.0 exact" in " ".join(capsys.readouterr().out.split())
    assert main(["bench", "scaling", *options, "--batch-size", "4"]) == 2  # more than the file holds
    assert capsys.readouterr().err.startswith("dager: error: ")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tiny_llama", "classification"),
        ("tiny_llama", "next_token"),
        ("tiny_bert", "classification"),
        ("tiny_masked_bert", "masked"),
    ],
)
def test_accuracy_counts_exact_and_false_texts(name, task, random_texts, monkeypatch, request):
    model, texts = request.getfixturevalue(name), random_texts(3, 12, 4, 6)
    (run,) = bench_accuracy(model, [("words", 12, texts, None)], task=task)
    ids = encode(model.tokenizer, texts)
    seen = masked_inputs(model.tokenizer, ids, 0)[0] if task == "masked" else ids
    wanted = [tuple(tokens[:-1] if task == "next_token" else tokens) for tokens in seen]
    assert (run.data, run.seed, run.batch_size, run.exact, run.false) == ("words", 12, 3, 1.0, 0)
    assert (run.n_tokens, run.status) == (sum(map(len, ids)), "exact")
    assert run.rows == (distinct_prefixes(wanted) if name == "tiny_llama" else sum(map(len, wanted)))
    # An attack that returns one text of two and a stray one is reported as such.
    spoilt = Reconstruction((wanted[0], (7, 7)), ("a", "b"), (1.0, 1.0), "partial", seconds={"total": 0.5})
    monkeypatch.setattr(benchmark, "attack", lambda *_, **__: spoilt)
    (run,) = bench_accuracy(model, [("words", 12, texts, None)], task=task)
    assert (run.exact, run.false, run.status) == (pytest.approx(1 / 3), 1, "partial")
    # A text that occurs twice gives its rows once.
    (run,) = bench_accuracy(model, [("words", 12, [texts[0], texts[0]], None)])
    assert (run.batch_size, run.rows) == (2, len(ids[0]))


def test_decoder_benchmarks_refuse_an_encoder_before_any_work(tiny_bert, monkeypatch):
    monkeypatch.setattr(benchmark, "client_update", lambda *_, **__: pytest.fail("worked in vain"))
    for run in (lambda: bench_decoder(tiny_bert, TEXTS, LABELS), lambda: bench_scaling(tiny_bert, [(TEXTS, LABELS)])):
        with pytest.raises(DagerError, match=r"tiny-bert.*dager bench encoder"):
            run()


def test_the_accuracy_command_prints_a_line_a_batch_and_writes_them(tiny_gpt2, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_gpt2)
    data = tmp_path / "words.tsv"
    data.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in zip(TEXTS, LABELS, strict=True)))
    result = tmp_path / "runs.json"
    options = ["--batch-size", "1", "--batch-size", "2", "--batches", "2", "--json", str(result)]
    assert main(["bench", "accuracy", "--model", "tiny", "--data", str(data), *options]) == 0
    runs = json.loads(result.read_text())["runs"]
    assert [(run["batch_size"], run["seed"], run["exact"]) for run in runs] == [
        (1, 0, 1.0), (1, 1, 1.0), (2, 0, 1.0), (2, 1, 1.0)
    ]  # fmt: skip
    assert capsys.readouterr().out.count("exact=1.000") == 4
