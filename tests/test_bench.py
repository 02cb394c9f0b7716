"""The decoder's benchmark: both attacks on one update, counts made by hand, times by a clock that stands still."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest

from dager_tutorial.cli import main
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation import bench, timing
from dager_tutorial.evaluation.bench import DecoderBenchmark, bench_decoder
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Status

TEXTS = ["the old man walks to the sea", "the old dog sleep", "we had good tea"]
LABELS = [0, 1, 0]


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def model(request):
    return request.getfixturevalue(request.param)


def test_both_attacks_get_the_same_update_and_find_the_same_texts(model, monkeypatch):
    updates = []
    for name in ("attack", "textbook_attack"):
        real = getattr(bench, name)

        def spy(given, update, real=real, **options):
            updates.append(update)
            return real(given, update, **options)

        monkeypatch.setattr(bench, name, spy)
    record = bench_decoder(model, TEXTS, LABELS)
    assert updates[0] is updates[1]
    assert (record.exact, record.textbook_exact, record.same_sentences) == (1.0, 1.0, True)
    assert (record.batch_size, record.n_tokens, record.hidden_size) == (3, 7 + 4 + 4, 64)
    assert record.distinct_prefixes == 7 + 2 + 4  # "the" and "the old" begin two texts
    assert record.status == "texts_complete"


def test_every_time_is_that_of_its_party(tiny_gpt2, monkeypatch):
    """The parties wind a clock that nothing else moves."""
    clock = {"perf_counter": 100.0, "process_time": 20.0}
    monkeypatch.setattr(timing, "time", SimpleNamespace(**{name: lambda n=name: clock[n] for name in clock}))
    truth, play = tuple(tiny_gpt2.tokenizer(TEXTS[0])["input_ids"]), bench.play

    def party(wall, processor, result):
        def act(*given, **options):
            clock["perf_counter"] += wall
            clock["process_time"] += processor
            return result(*given, **options)

        return act

    def finds(*sequences):
        empty = ("",) * len(sequences)
        return lambda *_, **__: Reconstruction(sequences, empty, (1.0,) * len(sequences), Status.NOISE, peak_rss_mb=7.0)

    monkeypatch.setattr(bench, "play", party(3.0, 5.0, play))
    monkeypatch.setattr(bench, "attack", party(2.0, 7.0, finds(truth)))
    monkeypatch.setattr(bench, "textbook_attack", party(50.0, 50.0, finds(truth, (9, 9))))
    record = bench_decoder(tiny_gpt2, TEXTS, LABELS)
    assert (record.client_seconds, record.fast_seconds, record.attack_cpu_seconds) == (3.0, 2.0, 7.0)
    assert (record.textbook_seconds, record.ratio) == (50.0, 25.0)
    assert (record.exact, record.textbook_exact, record.same_sentences) == (pytest.approx(1 / 3),) * 2 + (False,)
    assert (record.status, record.peak_rss_mb) == ("noise", 7.0)
    assert json.loads(json.dumps(record.to_json())) == record.to_json()
    assert type(record.status) is str


def test_without_the_textbook_version_its_fields_are_empty(tiny_gpt2):
    record = bench_decoder(tiny_gpt2, TEXTS, LABELS, textbook=False)
    names = ("textbook_seconds", "ratio", "same_sentences", "textbook_exact")
    assert [record.to_json()[name] for name in names] == [None] * 4
    assert record.exact == 1.0


def test_a_sentence_that_only_one_attack_finds_is_told(tiny_gpt2, monkeypatch):
    real = bench.textbook_attack
    monkeypatch.setattr(
        bench,
        "textbook_attack",
        lambda *given, **options: real(*given, span_threshold_0=1e-12, **options),
    )
    record = bench_decoder(tiny_gpt2, TEXTS, LABELS)
    assert (record.exact, record.textbook_exact, record.same_sentences) == (1.0, 0.0, False)


def test_the_client_trains_a_classifier_and_shares_everything(tiny_gpt2, monkeypatch):
    played = []
    real = bench.play
    monkeypatch.setattr(bench, "play", lambda *given, **options: played.append(real(*given, **options)) or played[0])
    monkeypatch.setattr(bench, "attack", lambda *_, **__: Reconstruction((), (), (), Status.NOISE))
    bench_decoder(tiny_gpt2, TEXTS, LABELS, textbook=False)
    update, truth = played[0]
    assert truth == real(tiny_gpt2, TEXTS, LABELS, config=ClientConfig())[1]
    own = {name for name, _ in tiny_gpt2.network.named_parameters()}
    assert {name.removeprefix("transformer.") for name in update.gradients} == own | {"score.weight"}


def test_decoder_benchmarks_refuse_an_encoder_before_any_work(tiny_bert, monkeypatch):
    monkeypatch.setattr(bench, "play", lambda *_, **__: pytest.fail("worked in vain"))
    with pytest.raises(DagerError, match=r"tiny-bert.*dager bench encoder"):
        bench_decoder(tiny_bert, TEXTS, LABELS)


def test_commands_write_records(tiny_llama, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_llama)
    data, out = tmp_path / "texts.tsv", tmp_path / "out.json"
    data.write_text("label\ttext\n" + "".join(f"{i % 2}\t{text}\n" for i, text in enumerate(TEXTS)), "utf-8")
    options = ["--model", "tiny", "--data", str(data), "--json", str(out)]
    assert main(["bench", "decoder", *options, "--batch-size", "3"]) == 0
    record = json.loads(out.read_text("utf-8"))
    assert list(record) == [field.name for field in fields(DecoderBenchmark)]
    assert record["same_sentences"] is True and record["exact"] == 1
    assert main(["bench", "scaling", *options, "--batch-size", "1", "--batch-size", "3"]) == 0
    runs = json.loads(out.read_text("utf-8"))["runs"]
    assert [run["batch_size"] for run in runs] == [1, 3]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for run in runs:
        sizes = [str(run[name]) for name in ("batch_size", "rows")]
        assert any(row[:2] == sizes and row[-2] == "100.0" for row in rows)
    assert main(["bench", "scaling", *options, "--batch-size", "4"]) == 2  # more than the file holds
    assert capsys.readouterr().err.startswith("dager: error: ")
