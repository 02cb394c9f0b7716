"""The command line, end to end on a tiny model, and everything a user can get wrong."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ElementTree
from importlib import import_module

import pytest
import torch
from helpers import WORDS, saved
from rich.cells import cell_len

from dager_tutorial.cli import main
from dager_tutorial.client.batch import truth_of
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.status import Status
from dager_tutorial.update import Update

TEXTS = ["we listen to the old river", "my father never knew her", "snow"]
BATCH = [part for text in TEXTS for part in ("--text", text)]
RECOVER_KEYS = {
    "status",
    "sequences",
    "texts",
    "scores",
    "confirmations",
    "seconds",
    "peak_rss_mb",
    "model",
    "n_parameters_used",
}
SCORE_KEYS = {
    "counted",
    "labelled",
    "rouge1",
    "rouge2",
    "rougeL",
    "exact",
    "token_accuracy",
    "batch_size",
    "n_tokens",
    "hidden_size",
}


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


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_capture_recover_score_give_what_attack_gives(folder, update, tmp_path, capsys):
    result, score, both = (tmp_path / name for name in ("result.json", "score.json", "both.json"))
    assert main(["recover", update, "--model", folder, "--json", str(result)]) == 0
    assert main(["score", str(result), "--model", folder, *BATCH, "--json", str(score)]) == 0
    assert main(["attack", "--model", folder, *BATCH, "--json", str(both)]) == 0
    output = capsys.readouterr().out
    assert all(output.count(text) >= 3 for text in TEXTS)
    assert f"certified: {Status.CERTIFIED.meaning[:40]}" in output and "advice" not in output
    assert set(read(result)) >= RECOVER_KEYS
    assert [one["certainty"] for one in read(result)["confirmations"]] == ["whole"] * len(TEXTS)
    assert all(any(tap.startswith("block ") for tap in one["by"]) for one in read(result)["confirmations"])
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
    share = "all" if task == "masked" else "attention"  # what a mask hid is read off the last MLP
    assert main(["capture", *model, *client, "--share", share, "--out", str(update)]) == 0
    assert main(["inspect", str(update), *model]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "room in the span to test whole texts" in shown and "prefix" not in shown
    head = ["--trained", task, "--seed", "3"]
    assert main(["recover", str(update), *model, *head, "--json", str(result)]) == 0
    assert main(["score", str(result), *model, *client, "--json", str(score)]) == 0
    assert main(["attack", *model, *client, "--json", str(both)]) == 0
    assert read(result)["status"] == "certified"
    assert sorted(read(result)["sequences"]) == sorted(read(both)["sequences"])
    assert read(score) == {key: read(both)[key] for key in SCORE_KEYS}
    assert read(score)["exact"] == 1
    if task == "masked":  # another seed masks other tokens, but what these hid was recovered, too
        assert main(["score", str(result), *model, *BATCH, "--task", "masked", "--json", str(score)]) == 0
        assert read(score)["exact"] == 1


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
        assert (read(ranks)["status"] == "certified") == said.startswith("exposed")


def test_every_option_of_the_client_reaches_it(folder, tmp_path):
    out, record = tmp_path / "update.safetensors", tmp_path / "record.json"
    name = "model.layers.0.self_attn.v_proj.weight"
    options = ["--dtype", "bfloat16", "--share", name, "--blocks", "2", "--out", str(out), "--json", str(record)]
    assert main(["capture", "--model", folder, *BATCH, "--task", "next_token", *options]) == 0
    gradients = Update.load(out).gradients
    assert list(gradients) == [name] and gradients[name].dtype == torch.bfloat16
    written = read(record)
    assert (written["kind"], written["tensors"], written["batch_size"]) == ("gradient", 1, len(TEXTS))
    assert written["numbers"] == gradients[name].numel()


@pytest.mark.parametrize("command", ["capture", "attack"])
def test_the_client_is_told_what_the_user_said(command, folder, tmp_path, monkeypatch):
    told = {}

    def spy(model, texts, labels, *, config):
        told.update(blocks=model.network.config.num_hidden_layers, texts=texts, labels=labels, config=config)
        raise KeyboardInterrupt

    monkeypatch.setattr("dager_tutorial.client.defended.play", spy)
    options = ["--task", "next_token", "--loss", "frobenius", "--dtype", "float64", "--padding-side", "left"]
    options += ["--max-length", "4", "--share", "a.weight, b.weight", "--seed", "5", "--blocks", "2"]
    labels = ["--label", "1", "--label", "2", "--label", "0"]
    out = ["--out", str(tmp_path / "update")] if command == "capture" else []
    assert main([command, "--model", folder, *BATCH, *labels, *options, *out]) == 130
    config = ClientConfig("next_token", "frobenius", "float64", ("a.weight", "b.weight"), "left", 4, 5)
    assert told == {"blocks": 2, "texts": TEXTS, "labels": [1, 2, 0], "config": config}
    assert not list(tmp_path.iterdir())


def test_local_training_is_captured_and_needs_epochs(folder, tmp_path, capsys):
    out = tmp_path / "update"
    local = ["--mini-batch", "2", "--local-lr", "1e-3", "--out", str(out)]
    assert main(["capture", "--model", folder, *BATCH, *local]) == 2
    assert "--epochs" in capsys.readouterr().err and not out.exists()
    assert main(["capture", "--model", folder, *BATCH, *local, "--epochs", "2"]) == 0
    assert Update.load(out).kind == "delta"


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
    rows = read(tmp_path / "ranks.json")["rows"]
    assert (rows[0]["name"], rows[0]["rank"]) == ("block 0 query, key, value", distinct_tokens)


def test_an_update_without_signal_is_no_mistake(folder, update, tmp_path, capsys):
    zeros, result = tmp_path / "zeros.safetensors", tmp_path / "result.json"
    Update({name: torch.zeros_like(tensor) for name, tensor in Update.load(update).gradients.items()}).save(zeros)
    assert main(["recover", str(zeros), "--model", folder, "--json", str(result)]) == 0
    assert read(result)["status"] == "no_signal" and read(result)["sequences"] == []
    shown = " ".join(capsys.readouterr().out.split())
    assert f"no_signal: {Status.NO_SIGNAL.meaning}" in shown and f"advice: {Status.NO_SIGNAL.advice}" in shown
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


def test_demo_fits_80_columns_and_draws_a_picture_without_a_network(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "demo.svg"
    arguments = ["demo", "--model", folder, "--batch-size", "2", "--svg", str(picture)]
    assert main([*arguments, "--json", str(tmp_path / "demo.json")]) == 0
    output, error = capsys.readouterr()
    assert not error
    assert max(cell_len(line) for line in output.splitlines()) <= 80
    for step in ("received", "recovered", "scores", "time", "biopsy", "q_proj", "certified", "completion"):
        assert step in output
    assert set(read(tmp_path / "demo.json")) >= RECOVER_KEYS | SCORE_KEYS
    assert "url(http" not in picture.read_text("utf-8")
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def result_of(path, model, batch, **change):
    """A result that found these texts, written as `dager recover --json` does."""
    sequences = [list(ids) for ids in truth_of(model, batch).sequences]
    decoded = [model.text_of(ids) for ids in sequences]
    record = {"status": "partial", "sequences": sequences, "texts": decoded, "scores": [1.0] * len(batch)}
    path.write_text(json.dumps(record | change))
    return str(path)


@pytest.mark.parametrize("confirmations", [None, [], [{"certainty": "whole", "by": ["block 1 MLP"]}] * 2])
def test_texts_that_the_tokenizer_lower_cases_are_marked_as_exact(confirmations, folder, tiny_llama, tmp_path, capsys):
    change = {} if confirmations is None else {"confirmations": confirmations}
    result = result_of(tmp_path / "result.json", tiny_llama, ["snow river", "we listen"], **change)
    batch = ["--text", "Snow  RIVER", "--text", "We listen", "--text", "my father"]
    assert main(["score", result, "--model", folder, *batch, "--json", str(tmp_path / "score.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["✓", "snow", "river", "Snow", "RIVER"] in lines and ["✓", "we", "listen", "We", "listen"] in lines
    assert ["✗", "nothing", "my", "father"] in lines
    assert read(tmp_path / "score.json")["exact"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("where", ["client.defended.play", "server.attack.attack", "evaluation.metrics.score"])
def test_an_interrupt_ends_without_a_traceback_and_keeps_the_older_result(where, folder, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dager_tutorial.{where}", interrupt)
    result = tmp_path / "result.json"
    result.write_text("old")
    assert main(["attack", "--model", folder, *BATCH, "--json", str(result)]) == 130
    assert capsys.readouterr() == ("", "dager: stopped\n")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_a_text_cannot_take_over_the_terminal(folder, tiny_llama, tmp_path, capsys):
    hostile = "snow \x1b[2J\x1b]0;title\x07 [bold red]and[/] more [/nothing]\nsnow\u202eriver"
    result = result_of(tmp_path / "result.json", tiny_llama, ["snow"], texts=[hostile])
    assert main(["score", result, "--model", folder, "--text", hostile]) == 0
    output = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(output)
    assert output.count("[bold") == 2


def test_the_attack_is_handed_the_update_and_nothing_of_the_truth(folder, monkeypatch):
    handed = {}
    module = import_module("dager_tutorial.server.attack")
    real = module.attack

    def spy(*positional, **named):
        handed.update(named, positional=positional)
        return real(*positional, **named)

    monkeypatch.setattr(module, "attack", spy)
    assert main(["attack", "--model", folder, *BATCH]) == 0
    assert set(handed) <= {"positional", "head", "config", "progress"} and len(handed["positional"]) == 2
    assert not any(text in repr((handed["positional"][1], handed["config"])) for text in TEXTS)
