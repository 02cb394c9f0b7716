"""`dager defend`: rows that are measured once, two attackers beside each other, and a task that is learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers import saved

from dager_tutorial.cli import main
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defended import Protection
from dager_tutorial.client.defenses.clipping import Clipping
from dager_tutorial.client.defenses.noise import Noise
from dager_tutorial.client.private import Privacy
from dager_tutorial.client.step import play
from dager_tutorial.data import Example
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.accuracy import Batch
from dager_tutorial.evaluation.defence_table import markdown_table, wilson
from dager_tutorial.evaluation.defending import Cell, leakage_row, usual_cells
from dager_tutorial.evaluation.leakage import leakage
from dager_tutorial.evaluation.sweep.store import read_rows
from dager_tutorial.evaluation.utility import Training, utility_row
from dager_tutorial.server.attack import attack

TEXTS = ["the black cat under our old table", "a doctor came late again"]
BATCH = Batch("words", 3, TEXTS, [0, 1])
STD = ClientConfig(head_std=0.02)


def test_clipping_and_withholding_leave_both_attackers_what_they_had_and_noise_takes_it(tiny_gpt2):
    cells = (
        Cell(),
        Cell(Protection(chain=(Clipping(1e-3),))),
        Cell(sends="without the embeddings"),
        Cell(Protection(chain=(Noise(1.0),))),
    )
    plain, clipped, fewer, noised = (leakage_row(tiny_gpt2, BATCH, cell, config=STD) for cell in cells)
    for row in (plain, clipped, fewer):
        assert (row["fixed_exact"], row["adaptive_exact"], row["adaptive_recall"]) == (1, 1, 1)
        assert row["adaptive_confirmed"] == 1 and row["adaptive_false"] == row["fixed_false"] == 0
    assert noised["adaptive_exact"] == noised["fixed_exact"] == noised["adaptive_false"] == 0
    assert noised["noise_over_norm"] == pytest.approx(1 / noised["gradient_norm"])
    assert fewer["entries"] < plain["entries"] == noised["entries"] and fewer["bytes"] < plain["bytes"]
    assert clipped["gradient_norm"] == pytest.approx(plain["gradient_norm"])
    with pytest.raises(DagerError, match="choose one of without the embeddings"):
        leakage_row(tiny_gpt2, BATCH, Cell(sends="without much"), config=STD)


def test_a_leak_is_counted_by_tokens_texts_and_what_is_false(tiny_gpt2):
    update, truth = play(tiny_gpt2, TEXTS, config=STD)
    found = attack(tiny_gpt2, update)
    gone = leakage(found, truth)
    assert (gone.exact, gone.recall, gone.confirmed, gone.false) == (1, 1, 1, 0)
    first = found.sequences.index(truth.sequences[0])
    half = replace(
        found,
        sequences=(truth.sequences[0][:3],),
        texts=("",),
        scores=found.scores[:1],
        confirmations=(found.confirmations[first],),
        labels=(),
        copies=(),
    )
    gone = leakage(half, truth)
    assert (gone.exact, gone.confirmed, gone.false) == (0, 0, 1)
    assert gone.recall == pytest.approx(3 / sum(map(len, truth.sequences)))


def test_every_usual_defence_has_a_name_of_its_own():
    names = [cell.name for cell in usual_cells()]
    assert len(set(names)) == len(names) and names[0] == "nothing"
    assert {"noise=0.0001", "keep=1% by magnitude", "DP-SGD epsilon=8 delta=1e-05 clip=1"} <= set(names)


def test_a_task_is_learned_and_noise_as_large_as_the_weights_unlearns_it(tiny_gpt2, random_texts):
    good, bad = ["good", "glad", "clever", "free", "friend"], ["bad", "angry", "dead", "hungry", "alone"]
    examples = [
        Example(label, f"{words[seed % 5]} {text}")
        for label, words in enumerate((bad, good))
        for seed, text in enumerate(random_texts(60, seed=label))
    ]
    how = Training(steps=60, batch_size=8, learning_rate=3e-3, tests=40)
    before = {name: each.clone() for name, each in tiny_gpt2.network.named_parameters()}
    plain = utility_row(tiny_gpt2, examples, Cell(), 0, how)
    private = utility_row(tiny_gpt2, examples, Cell(Protection(privacy=Privacy(0.1, clip=0.1))), 0, how)
    assert plain["right"] >= 34 and plain["tests"] == 40 and plain["texts"] == 80
    assert private["right"] <= plain["right"] - 5
    assert private["sample_rate"] == 0.1 and private["steps"] == 60 and private["epsilon"] <= 0.1
    assert all((each == before[name]).all() for name, each in tiny_gpt2.network.named_parameters())
    assert plain == utility_row(tiny_gpt2, examples, Cell(), 0, how) | {"seconds": plain["seconds"]}
    with pytest.raises(DagerError, match="hold out fewer"):
        utility_row(tiny_gpt2, examples, Cell(), 0, replace(how, tests=119))


def test_what_is_measured_is_not_run_again_and_the_table_has_both_halves(tiny_gpt2, tmp_path, capsys, monkeypatch):
    folder, rows, data = saved(tiny_gpt2, tmp_path / "model"), tmp_path / "rows", tmp_path / "words.tsv"
    data.write_text("label\ttext\n" + "".join(f"{index % 2}\t{TEXTS[index % 2]}\n" for index in range(30)))
    leak = ["defend", "leakage", "--model", folder, "--data", str(data), "--batch-size", "1", "--rows", str(rows)]
    learn = ["defend", "utility", "--model", folder, "--data", str(data), "--rows", str(rows), "--tests", "10"]
    learn += ["--updates", "2", "--runs", "2", "--clip", "1"]
    assert main([*leak, "--batches", "2", "--clip", "1", "--head-std", "0.02"]) == main(learn) == 0
    assert len(read_rows(rows)) == 4 and "2 rows made" in capsys.readouterr().out
    assert main([*leak, "--batches", "3", "--clip", "1", "--head-std", "0.02"]) == 0
    assert "1 rows made" in capsys.readouterr().out and [row["seed"] for row in read_rows(rows)][-1] == 2
    made, record = tmp_path / "table.md", tmp_path / "rows.json"
    assert main(["defend", "table", str(rows), "--markdown", str(made), "--json", str(record)]) == 0
    first = made.read_text().split("\n")[2]
    assert "| clip=1 | 3 |" in first and "% (" in first and len(json.loads(record.read_text())["rows"]) == 5
    assert main(["defend", "leakage", "--model", "m", "--data", "no-such", "--batch-size", "1", "--rows", "r"]) == 2
    assert main([*learn, "--epsilon", "8", "--steps", "3"]) == 2


def test_the_interval_is_wilson_s_and_contains_the_share():
    for right, tests in ((0, 10), (5, 10), (10, 10), (270, 288)):
        low, high = wilson(right, tests)
        assert -1e-9 <= low <= right / tests + 1e-9 and right / tests - 1e-9 <= high <= 1 + 1e-9
    assert markdown_table([]).startswith("| model |")
