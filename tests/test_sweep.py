"""Grids name every mistake, cells fill the records of the attack, and a row is what `dager attack` would have said."""

from __future__ import annotations

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from dager_tutorial.cli import main
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defenses.clipping import Clipping
from dager_tutorial.client.defenses.noise import Noise
from dager_tutorial.client.federated import LocalTraining
from dager_tutorial.client.private import Privacy
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.starts import starting_tokens
from dager_tutorial.evaluation.sweep import cell as cells_done
from dager_tutorial.evaluation.sweep import devices, workers
from dager_tutorial.evaluation.sweep.cells import key_of
from dager_tutorial.evaluation.sweep.grid import cells_of, read_axes, read_grids
from dager_tutorial.evaluation.sweep.pool import Engine
from dager_tutorial.evaluation.sweep.records import GROUPS, check_cells, plan_of
from dager_tutorial.evaluation.sweep.store import read_rows
from dager_tutorial.textbook.spans import textbook_span

GRID = """
grids:
  - models: [random:gpt2, {name: minilm-l6, blocks: 3}]
    corpora: notes
    batch_sizes: [1, 2]
    settings: [default, {client: {dtype: bfloat16, share: [a.b, c]}, training: {learning_rate: 1e-4, epochs: 10}}]
    attacks: [dager, {name: textbook, span_threshold_0: 2e-5}]
    seeds: [7, 3..4]
  - {models: random:gpt2, corpora: [notes], batch_sizes: [2], seeds: 7, attacks: dager}
"""
CELL = {"model": "random:gpt2", "corpus": "notes", "batch_size": 2, "attack": "dager", "seed": 0}


def test_a_grid_is_all_combinations_each_once_model_after_model(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID, "utf-8")
    cells = cells_of(read_grids(path), "grid")
    assert len(cells) == 2 * 2 * 2 * 2 * 3 == len(set(map(key_of, cells)))  # the second grid's cell is in the first
    assert [cell["model"] for cell in cells] == ["random:gpt2"] * 24 + ["minilm-l6"] * 24
    assert cells[0] == {"model": "random:gpt2", "corpus": "notes", "batch_size": 1, "attack": "dager", "seed": 7}
    last = cells[-1]
    assert (last["model.blocks"], last["client.share"], last["attack.span_threshold_0"]) == (3, ["a.b", "c"], 2e-5)
    assert (last["training.learning_rate"], last["seed"]) == (1e-4, 4)  # which YAML alone takes for a word


def test_every_mistake_of_a_grid_is_named_with_file_and_key(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text("model: [a]\nmodels: [{blocks: 2}]\nbatch_sizes: [0, two]\nseeds: 9..3\nattacks: []\n", "utf-8")
    assert main(["sweep", str(path), "--rows", str(tmp_path / "rows")]) == 2
    said = capsys.readouterr().err
    for part in (
        f"{path}: 7 mistakes: model: no such axis, did you mean models?",
        "corpora: is missing",
        "models[0]: is",
        "batch_sizes[0]: is '0': give a whole number from 1",
        "batch_sizes[1]: is 'two'",
        "seeds: is '9..3'",
        "attacks: is empty",
    ):
        assert part in said
    assert said.count("\n") == 1 and not (tmp_path / "rows").exists()


@pytest.mark.parametrize("content", ["- 1", "grids: []", "[", "models: &a [*a]", ""])
def test_what_is_no_grid_is_refused(content, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(DagerError, match=r"grid\.yaml: "):
        cells_of(read_grids(path), str(path))


def test_the_command_line_spells_axes_as_the_file_does():
    axes = read_axes(["models={name: random:gpt2, blocks: 3}, minilm-l6", "settings=[{client: {task: masked}}]"])
    assert axes["models"] == [{"name": "random:gpt2", "blocks": 3}, "minilm-l6"]
    assert axes["settings"] == [{"client": {"task": "masked"}}]
    for wrong in ("models", "models=[a", "=", "a: b"):
        with pytest.raises(DagerError, match="--vary"):
            cells_of([read_axes([wrong])], "--vary")


def test_defences_are_done_in_the_order_in_which_they_are_asked_for():
    axes = {"models": "m", "corpora": "notes", "batch_sizes": 1, "seeds": 0}
    defences = [{"noise": {"deviation": 1e-3}, "clipping": {"norm": 2}}, {"privacy": {"epsilon": 3}}, "none"]
    noised, private, plain = (
        plan_of(cell)
        for cell in cells_of([{**axes, "defences": defences, "settings": {"client": {"dropout": 0.1}}}], "")
    )
    assert noised.protection.chain == (Noise(1e-3), Clipping(2)) and noised.protection.dropout == 0.1
    assert private.protection.privacy == Privacy(3) and private.protection.chain == plain.protection.chain == ()


def test_every_field_of_a_record_is_an_option_of_its_group():
    """A field that a record gets tomorrow is an option tomorrow."""
    values = {"client.dtype": "float64", "training.epochs": 3, "adapter.rank": 5, "model.blocks": 2}
    plan = plan_of(CELL | values | {"attack.time_budget": 3.0, "attack.without": ["polish"]})
    assert plan.client == ClientConfig(dtype="float64") and plan.training == LocalTraining(3)
    assert plan.adapter.rank == 5 and plan.model == {"blocks": 2}
    assert (plan.options.time_budget, plan.options.without) == (3.0, frozenset({"polish"}))
    assert plan_of(CELL).training is None and plan_of(CELL).adapter is None
    for group, record in GROUPS.items():
        for field in fields(record):
            plan_of(CELL | {f"{group}.{field.name}": field.default})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"client.dtyp": "float64"}, r"client\.dtyp: no such option, did you mean dtype"),
        ({"client.dtype": "float128"}, r"client\.dtype is 'float128': choose one of"),
        ({"trainings.epochs": 1}, r"trainings\.epochs: no such group, did you mean training"),
        ({"defence.nois.deviation": 1.0}, r"defence\.nois: no such option, did you mean noise"),
        ({"defence.noise.deviation": -1.0}, r"defence\.noise\.deviation is -1\.0"),
        ({"model.layers": 1}, r"model\.layers: no such option"),
        ({"attack": "dagger"}, "attack 'dagger': no such attack, did you mean dager"),
        ({"attack.time_budget": -1.0}, r"attack\.time_budget is -1\.0"),
        ({"attack": "textbook", "attack.cutoff": 3}, r"attack\.cutoff: no such option, did you mean rank_cutoff"),
    ],
)
def test_wrong_options_are_refused_before_the_first_cell(option, said):
    with pytest.raises(DagerError, match=said):
        check_cells([CELL, CELL | option], "grid.yaml")


@pytest.fixture
def zoo(tiny_gpt2, tiny_bert, monkeypatch):
    """A zoo of two tiny models."""
    models = {"tiny-gpt2": tiny_gpt2, "tiny-bert": tiny_bert}
    for place in ("dager_tutorial.zoo.names.load_model", "dager_tutorial.evaluation.sweep.cell.load_model"):
        monkeypatch.setattr(place, lambda name, **_: models[name])
    cells_done._kept.clear()
    yield
    cells_done._kept.clear()


def test_a_row_says_what_dager_attack_says_of_the_same_batch(zoo, tmp_path, random_texts):
    texts = "".join(f"{n % 2}\t{text}\n" for n, text in enumerate(random_texts(8, seed=5)))
    (tmp_path / "words.tsv").write_text(f"label\ttext\n{texts}", "utf-8")
    rows, record = tmp_path / "rows", tmp_path / "attack.json"
    grid, others = tmp_path / "grid.yaml", ["--rows", str(rows), "--texts", str(tmp_path), "--workers", "1"]
    axes = "models: {}, corpora: words, batch_sizes: 3, seeds: 0"
    local_training = "settings: {training: {epochs: 2, learning_rate: 1e-3}}"
    both, one = axes.format("[tiny-gpt2, tiny-bert]"), f"{axes.format('tiny-gpt2')}, {local_training}"
    grid.write_text(f"grids:\n  - {{{both}}}\n  - {{{one}}}\n", "utf-8")
    command = ["sweep", str(grid), *others]
    assert main(command) == 0
    made = {(row["model"], row.get("training.epochs")): row for row in read_rows(rows)}
    assert len(made) == 3
    for (model, epochs), row in made.items():
        local = ["--epochs", str(epochs), "--local-lr", "1e-3"] if epochs else []
        data = ["--data", str(tmp_path / "words.tsv"), "--batch-size", "3", *local, "--json", str(record)]
        assert main(["attack", "--model", model, *data]) == 0
        told = json.loads(record.read_text("utf-8"))
        names = ("status", "rouge1", "rouge2", "rougeL", "exact", "token_accuracy", "counted", "n_tokens")
        assert {name: row[name] for name in names} == {name: told[name] for name in names}
        assert (row["error"], row["width"], row["false_confirmed"]) == (None, 64, 0)
        assert row["rank"] == next(iter(told["ranks"].values())) and row["seconds.attack"] > 0
    before = (rows / "rows.jsonl").read_bytes()
    assert main(command) == 0 and (rows / "rows.jsonl").read_bytes() == before


def test_an_earlier_attack_runs_on_the_same_update_and_confirms_nothing(zoo, tmp_path):
    axes = ["models=tiny-gpt2", "corpora=notes", "batch_sizes=2", "seeds=0", "attacks=dager, {name: tag, steps: 3}"]
    options = [word for axis in axes for word in ("--vary", axis)]
    assert main(["sweep", *options, "--rows", str(tmp_path), "--workers", "1"]) == 0
    ours, earlier = read_rows(tmp_path)
    assert (earlier["steps"], earlier["false_confirmed"], earlier["error"]) == (3, 0, None)
    assert earlier["sent.gradient_norm"] == ours["sent.gradient_norm"] and ours["rouge1"] > earlier["rouge1"]
    judged = plan_of(CELL | {"attack": "lamp", "attack.prior": "some", "attack.steps": 5, "attack.time_budget": 2.0})
    assert (judged.options.prior, judged.options.effort.steps, judged.options.limits.time_budget) == ("some", 5, 2.0)


def test_a_cell_that_fails_is_a_row_that_says_why(zoo, tmp_path, capsys):
    axes = ["models=tiny-bert, tiny-gpt2", "corpora=nowhere, notes", "batch_sizes=2", "seeds=0"]
    wrong = "settings={client: {task: next_token}}"
    options = [word for axis in (*axes, wrong) for word in ("--vary", axis)]
    assert main(["sweep", *options, "--rows", str(tmp_path), "--workers", "1"]) == 0
    errors = {(row["model"], row["corpus"]): row["error"] for row in read_rows(tmp_path)}
    assert "no such file" in errors["tiny-gpt2", "nowhere"]
    assert "task 'next_token' needs a causal model" in errors["tiny-bert", "notes"]
    assert errors["tiny-gpt2", "notes"] is None
    assert "failed     3" in capsys.readouterr().out


# ---- workers


def test_no_more_workers_than_memory_cores_and_gpus(monkeypatch):
    needs = {"small": 10**9, "large": 10**10}
    monkeypatch.setattr(workers, "model_needs", lambda name, blocks: SimpleNamespace(whole=needs[name]))
    monkeypatch.setattr(workers, "available_memory", lambda: 33 * 10**9)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    small, large = ({**CELL, "model": name} for name in ("small", "large"))
    trained = {**small, "training.epochs": 3}
    assert [workers.affordable(each, "cpu") for each in ([small], [small, trained], [small, large], [])] == [5, 4, 1, 6]
    assert workers.affordable([small], "cuda") == 2
    monkeypatch.setattr(workers, "available_memory", lambda: 10**9)
    assert workers.affordable([large], "cpu") == 1  # loading it says that it does not fit


def test_each_worker_takes_a_gpu_of_its_own_until_it_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(devices, "_held", held := [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    claim = devices.claimed.__wrapped__
    assert [claim("cpu"), claim("cuda"), claim("cuda"), claim("cuda:1")] == ["cpu", "cuda:0", "cuda:1", "cuda:1"]
    with pytest.raises(DagerError, match="all 2 GPUs are taken"):
        claim("cuda")
    held[0].release()
    assert claim("cuda") == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DagerError, match="no GPU"):
        claim("cuda")


def test_an_engine_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DagerError, match=r"pip install 'dager-tutorial\[ray\]'"), Engine("ray").pool():
        pass
    with pytest.raises(DagerError, match="needs --address"):
        Engine("dask")


# ---- the textbook's options


def test_the_tokens_that_begin_texts_pass_both_tests(tiny_gpt2, random_texts):
    texts = random_texts(4, seed=2)
    update, truth = play(tiny_gpt2, texts)
    first, both = starting_tokens(tiny_gpt2, update)
    begin = {(ids[0],) for ids in truth.sequences}
    assert set(both) == begin and first >= len(both)
    everything, none = starting_tokens(tiny_gpt2, update, threshold_0=2.0, threshold_1=0.0)
    assert everything == len(tiny_gpt2.tokenizer) and none == []


def test_a_rank_cutoff_leaves_something_to_test_in_a_full_span():
    full = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert textbook_span(full).shape == (16, 16)
    kept = textbook_span(full, rank_cutoff=5)
    assert torch.equal(kept, textbook_span(full)[:, :11])
    assert textbook_span(full[:3], rank_cutoff=5).shape == (16, 3)  # a rank far below is left alone
