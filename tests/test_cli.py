"""The command line, end to end on a tiny model, and everything a user can get wrong."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS
from rich.cells import cell_len
from rich.console import Console

from dager_tutorial.cli import display
from dager_tutorial.cli.app import main
from dager_tutorial.update import Update

TEXTS = ["we listen to the old river", "my father never knew her", "snow"]
BATCH = [part for text in TEXTS for part in ("--text", text)]
RECOVER_KEYS = {
    "status",
    "sequences",
    "texts",
    "scores",
    "seconds",
    "peak_rss_mb",
    "model",
    "n_parameters_used",
}
SCORE_KEYS = {
    "rouge1",
    "rouge2",
    "rougeL",
    "exact",
    "token_accuracy",
    "batch_size",
    "n_tokens",
    "hidden_size",
}


def saved(model, path):
    """A checkpoint folder, as `--model` takes it."""
    model.network.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return saved(tiny_llama, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def encoder_folder(tiny_masked_bert, tmp_path_factory):
    return saved(tiny_masked_bert, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def update(folder, tmp_path_factory):
    """The update of `TEXTS`, captured by the command line."""
    path = tmp_path_factory.mktemp("update") / "update.safetensors"
    assert main(["capture", "--model", folder, *BATCH, "--out", str(path)]) == 0
    return str(path)


def fail(arguments, capsys):
    """Run a command line that must fail; return its one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    output, error = capsys.readouterr()
    assert not output
    assert error.startswith("dager: error: ") and error.count("\n") == 1 and error.endswith("\n")
    return error


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_capture_recover_score_give_what_attack_gives(folder, update, tmp_path, capsys):
    result, score, both = (tmp_path / name for name in ("result.json", "score.json", "both.json"))
    assert main(["recover", update, "--model", folder, "--json", str(result)]) == 0
    assert main(["score", str(result), "--model", folder, *BATCH, "--json", str(score)]) == 0
    assert main(["attack", "--model", folder, *BATCH, "--json", str(both)]) == 0
    output = capsys.readouterr().out
    assert all(text in output for text in TEXTS)
    assert set(read(result)) >= RECOVER_KEYS
    assert set(read(result)["seconds"]) >= {"subspace", "filter", "search", "total"}
    assert set(read(score)) == SCORE_KEYS
    assert set(read(both)) >= RECOVER_KEYS | SCORE_KEYS
    assert read(result)["sequences"] == read(both)["sequences"]
    assert sorted(read(result)["texts"]) == sorted(TEXTS)
    assert read(score) == {key: read(both)[key] for key in SCORE_KEYS}
    assert read(score)["exact"] == 1 and read(score)["batch_size"] == len(TEXTS)


@pytest.mark.parametrize("task", ["classification", "masked"])
def test_encoders_go_through_the_same_commands(encoder_folder, task, tmp_path, capsys):
    update, result, score, both = (tmp_path / name for name in ("update", "result.json", "score.json", "both.json"))
    model, client = ["--model", encoder_folder], [*BATCH, "--task", task, "--seed", "3"]
    assert main(["capture", *model, *client, "--share", "attention", "--out", str(update)]) == 0
    assert main(["inspect", str(update), *model]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "room in the span to test whole texts" in shown and "prefix" not in shown
    assert main(["recover", str(update), *model, "--json", str(result)]) == 0
    assert main(["score", str(result), *model, *client, "--json", str(score)]) == 0
    assert main(["attack", *model, *client, "--json", str(both)]) == 0
    assert read(result)["status"] == "exact"
    assert sorted(read(result)["sequences"]) == sorted(read(both)["sequences"])
    assert read(score) == {key: read(both)[key] for key in SCORE_KEYS}
    assert read(score)["exact"] == 1
    if task == "masked":  # another seed masks other tokens: what was recovered is not that truth
        assert main(["score", str(result), *model, *BATCH, "--task", "masked", "--json", str(score)]) == 0
        assert read(score)["exact"] < 1


def test_inspect_promises_of_an_encoder_what_the_attack_keeps(encoder_folder, tmp_path):
    """Sharing the attention inputs alone, or more tokens than dimensions from few words, leaves single tokens."""
    first = [f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value")]
    few = [" ".join(random.Random(seed).choices(WORDS[:12], k=10)) for seed in range(8)]
    many = [" ".join(WORDS[start : start + 9]) for start in range(0, 99, 9)]
    batches = {
        "to test whole texts": (TEXTS, "attention"),
        "without its attention output gradient whole texts cannot": (TEXTS, ",".join(first)),
        "whole texts cannot: they have about as many as the model is wide": (few, "attention"),
        "even single tokens hide": (many, "attention"),
    }
    for verdict, (texts, share) in batches.items():
        out, ranks = tmp_path / "update", tmp_path / "ranks.json"
        batch = [part for text in texts for part in ("--text", text)]
        assert main(["capture", "--model", encoder_folder, *batch, "--share", share, "--out", str(out)]) == 0
        assert main(["inspect", str(out), "--model", encoder_folder, "--json", str(ranks)]) == 0
        said = read(ranks)["verdict"]
        assert verdict in said and "prefix" not in said
        assert main(["recover", str(out), "--model", encoder_folder, "--json", str(ranks)]) == 0
        assert (read(ranks)["status"] == "exact") == said.startswith("exposed")


def test_every_option_of_the_client_reaches_it(folder, tmp_path):
    out, record = tmp_path / "update.safetensors", tmp_path / "record.json"
    name = "model.layers.0.self_attn.v_proj.weight"
    options = ["--task", "next_token", "--dtype", "bfloat16", "--padding-side", "left", "--max-length", "4"]
    arguments = [
        "capture",
        "--model",
        folder,
        *BATCH,
        *options,
        "--share",
        name,
        "--blocks",
        "2",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--json", str(record)]) == 0
    gradients = Update.load(out).gradients
    assert list(gradients) == [name] and gradients[name].dtype == torch.bfloat16
    written = read(record)
    assert (written["kind"], written["tensors"], written["batch_size"]) == ("gradient", 1, len(TEXTS))
    assert written["numbers"] == gradients[name].numel()


def test_texts_of_a_file_are_drawn_by_seed(folder, tmp_path):
    texts = tmp_path / "texts.tsv"
    texts.write_text("label\ttext\n" + "".join(f"{index % 2}\t{text}\n" for index, text in enumerate(TEXTS)))

    def captured(seed):
        out = tmp_path / f"{seed}.safetensors"
        batch = ["--data", str(texts), "--batch-size", "1", "--seed", str(seed)]
        assert main(["capture", "--model", folder, *batch, "--loss", "frobenius", "--out", str(out)]) == 0
        return Update.load(out).gradients["model.layers.0.self_attn.v_proj.weight"]

    assert torch.equal(captured(0), captured(0))
    assert len({float(captured(seed).norm()) for seed in range(12)}) == len(TEXTS)


def test_inspect_shows_ranks_and_a_verdict(folder, update, tmp_path, capsys):
    capsys.readouterr()
    assert main(["inspect", update, "--model", folder, "--json", str(tmp_path / "ranks.json")]) == 0
    output = capsys.readouterr().out
    distinct_tokens = len({word for text in TEXTS for word in text.split()})
    assert re.search(rf"block 0 query, key, value\s+{distinct_tokens}\s+64\s", output)
    assert read(tmp_path / "ranks.json")


def test_an_update_without_signal_is_no_mistake(folder, update, tmp_path):
    zeros, result = tmp_path / "zeros.safetensors", tmp_path / "result.json"
    Update({name: torch.zeros_like(tensor) for name, tensor in Update.load(update).gradients.items()}).save(zeros)
    assert main(["recover", str(zeros), "--model", folder, "--json", str(result)]) == 0
    assert read(result)["status"] == "no_signal" and read(result)["sequences"] == []
    assert main(["score", str(result), "--model", folder, *BATCH]) == 0


def test_models_fetch_takes_several_names_and_says_where_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGER_CACHE", str(tmp_path / "cache"))
    assert main(["models", "fetch", folder, folder, "--json", str(tmp_path / "fetched.json")]) == 0
    assert read(tmp_path / "fetched.json") == {"models": [folder, folder], "cache": str(tmp_path / "cache")}
    assert main(["models", "fetch", "no-such-model"]) == 2


def test_models_lists_the_zoo_and_exports_a_folder_that_loads(folder, tmp_path, capsys):
    assert main(["models", "--json", str(tmp_path / "models.json")]) == 0
    names = {record["name"] for record in read(tmp_path / "models.json")["models"]}
    assert {"smollm2-135m", "minilm-l6", "random:gpt2"} <= names
    assert "smollm2-135m" in capsys.readouterr().out
    assert main(["models", "export", folder, str(tmp_path / "copy"), "--blocks", "1"]) == 0
    out = str(tmp_path / "update.safetensors")
    assert main(["capture", "--model", str(tmp_path / "copy"), *BATCH, "--out", out]) == 0
    assert "model.layers.1.self_attn.v_proj.weight" not in Update.load(out).gradients


def test_bench_hands_on_its_options_and_writes_the_record(folder, tmp_path, capsys, monkeypatch):
    record = {"textbook_seconds": None, "fast_seconds": 0.25, "ratio": None, "same_sentences": None}
    calls = []

    def bench_decoder(model, texts, labels, *, textbook=True, progress=None):
        calls.append((len(texts), len(labels), textbook))
        return SimpleNamespace(to_json=lambda: record)

    monkeypatch.setitem(sys.modules, "dager_tutorial.evaluation.bench", SimpleNamespace(bench_decoder=bench_decoder))
    arguments = ["bench", "decoder", "--model", folder, "--data", "notes", "--batch-size", "3"]
    assert main([*arguments, "--no-textbook", "--json", str(tmp_path / "bench.json")]) == 0
    assert main(arguments) == 0
    assert calls == [(3, 3, False), (3, 3, True)]
    assert read(tmp_path / "bench.json") == record
    assert "fast seconds" in capsys.readouterr().out


def test_demo_fits_80_columns_and_draws_a_picture_without_a_network(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "demo.svg"
    arguments = ["demo", "--model", folder, "--batch-size", "2", "--svg", str(picture)]
    assert main([*arguments, "--json", str(tmp_path / "demo.json")]) == 0
    output, error = capsys.readouterr()
    assert not error
    assert max(cell_len(line) for line in output.splitlines()) <= 80
    for step in ("received", "recovered", "scores", "time", "biopsy", "q_proj", "exact"):
        assert step in output
    assert set(read(tmp_path / "demo.json")) >= RECOVER_KEYS | SCORE_KEYS
    assert "url(http" not in picture.read_text("utf-8")
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


MISTAKES = {
    "no such file": ["recover", "missing.safetensors", "--model", "MODEL"],
    "missing option": ["recover", "UPDATE"],
    "no such option": ["recover", "UPDATE", "--model", "MODEL", "--batch-size", "4"],
    "no such command": ["recuperate"],
    "unknown model": ["recover", "UPDATE", "--model", "gpt7"],
    "absent": ["recover", "UPDATE", "--model", "MODEL", "--json", "absent/result.json"],
    "is a folder": ["recover", "UPDATE", "--model", "MODEL", "--json", "."],
    "absent/update": ["capture", "--model", "MODEL", "--text", "a", "--out", "absent/update.safetensors"],
    "--data": ["attack", "--model", "MODEL"],
    "either with --data": ["attack", "--model", "MODEL", "--data", "notes", "--text", "a"],
    "--label belongs to --text": ["attack", "--model", "MODEL", "--data", "notes", "--label", "1"],
    "--batch-size draws from --data": ["attack", "--model", "MODEL", "--text", "a", "--batch-size", "1"],
    "batch size 999": ["attack", "--model", "MODEL", "--data", "notes", "--batch-size", "999"],
    "--batch-size": ["bench", "decoder", "--model", "MODEL", "--data", "notes", "--batch-size", "0"],
    "use task 'masked'": ["attack", "--model", "ENCODER", "--text", "a", "--task", "next_token"],
    "bidirectional model": ["attack", "--model", "MODEL", "--text", "a", "--task", "masked"],
    "dager bench encoder": ["bench", "scaling", "--model", "ENCODER", "--data", "notes"],
    "dager bench accuracy": ["bench", "encoder", "--model", "MODEL", "--data", "notes", "--batch-size", "1"],
    "no polish": ["bench", "encoder", "--model", "ENCODER", "--data", "notes", "--batch-size", "1", "--variant", "x"],
    "--task": ["attack", "--model", "MODEL", "--text", "a", "--task", "translation"],
    "--device": ["recover", "UPDATE", "--model", "MODEL", "--device", "abacus"],
    "texts.tsv": ["attack", "--model", "MODEL", "--data", "texts.tsv"],
    "no result of dager recover": ["score", "UPDATE.json", "--model", "MODEL", "--text", "a"],
    "result.json": ["score", "result.json", "--model", "MODEL", "--text", "a"],
    "wte": ["attack", "--model", "MODEL", "--text", "a", "--share", "wte.weight"],
}


@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line(message, arguments, folder, encoder_folder, update, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "UPDATE.json").write_text('{"status": "splendid"}')
    names = {"MODEL": folder, "ENCODER": encoder_folder, "UPDATE": update}
    line = fail([names.get(argument, argument) for argument in arguments], capsys)
    assert message.lower() in line.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["UPDATE.json"]


def test_an_output_that_cannot_be_written_is_found_before_the_work(update, capsys, monkeypatch):
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: pytest.fail("worked in vain"))
    for option in ("--json", "--svg"):
        assert "absent" in fail(["demo", option, "absent/file"], capsys)
    assert "absent" in fail(["inspect", update, "--model", "any", "--json", "absent/file"], capsys)


RESULT = {"status": "exact", "sequences": [[4, 5]], "texts": ["a about"], "scores": [1.0]}


@pytest.mark.parametrize(
    "change",
    [
        {"status": "splendid"},
        {"sequences": [[4], [5]]},
        {"sequences": 4},
        {"sequences": [["four"]]},
        {"scores": ["good"]},
        {"texts": None},
    ],
    ids=str,
)
def test_a_broken_result_is_refused(change, folder, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT | {"scores": [None]}))
    assert main(["score", str(path), "--model", folder, "--text", "a about"]) == 0
    path.write_text(json.dumps(RESULT | change))
    assert "result.json" in fail(["score", str(path), "--model", folder, "--text", "a about"], capsys)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"1e999"])
def test_a_file_that_is_no_result_is_refused(content, folder, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    assert "result.json" in fail(["score", str(path), "--model", folder, "--text", "a"], capsys)


def test_an_interrupt_ends_without_a_traceback(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dager_tutorial.client.step.client_update", interrupt)
    assert main(["attack", "--model", folder, *BATCH]) == 130
    assert capsys.readouterr().err == "dager: stopped\n"


def test_a_text_cannot_take_over_the_terminal(folder, tmp_path, capsys):
    hostile = "snow \x1b[2J\x1b]0;title\x07 [bold red]and[/] more [/nothing]\nsnow\u202eriver"
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"status": "partial", "sequences": [[4]], "texts": [hostile], "scores": [1.0]}))
    assert main(["score", str(result), "--model", folder, "--text", hostile]) == 0
    output = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(output)
    assert "[bold" in output


def test_the_attack_is_handed_the_update_and_nothing_of_the_truth(folder, monkeypatch):
    handed = {}
    module = import_module("dager_tutorial.server.attack")
    real = module.attack

    def spy(*positional, **named):
        handed.update(named, positional=positional)
        return real(*positional, **named)

    monkeypatch.setattr(module, "attack", spy)
    assert main(["attack", "--model", folder, *BATCH]) == 0
    assert set(handed) <= {"positional", "config", "progress"} and len(handed["positional"]) == 2
    assert not any(text in repr((handed["positional"][1], handed["config"])) for text in TEXTS)


def test_progress_is_shown_only_where_somebody_watches():
    with display.progress(Console(force_terminal=False)) as advance:
        assert advance is None
    watched = Console(force_terminal=True, record=True, width=80)
    with display.progress(watched) as advance:
        advance("filter", 0, None)
        advance("filter", 3, 4)
        advance("search", 1, 2)


def test_help_loads_no_torch_and_the_four_calls_keep_their_names():
    script = """
import sys
import dager_tutorial
from dager_tutorial.cli.app import main
assert main(["recover", "--help"]) == 0 and main([]) == 0 and main(["--version"]) == 0
assert not {"torch", "transformers"} & set(sys.modules)
import dager_tutorial.server.attack
from dager_tutorial import attack
from dager_tutorial import client_update
from dager_tutorial import load_model
from dager_tutorial import score
assert all(callable(call) for call in (attack, client_update, load_model, score, dager_tutorial.attack))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
