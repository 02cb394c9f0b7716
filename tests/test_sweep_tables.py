"""The paper's tables: published figures as printed, ours under them, empty where nothing was run; figures from rows."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dager_tutorial.cli import main
from dager_tutorial.evaluation.tables.curves import curves_of
from dager_tutorial.evaluation.tables.layout import NOT_RUN, PAPER, laid_out
from dager_tutorial.evaluation.tables.matching import matches
from dager_tutorial.evaluation.tables.published import published
from dager_tutorial.evaluation.tables.rendering import as_html, as_markdown
from dager_tutorial.evaluation.tables.statistics import interval, printed

TABLES = published().tables
VERSIONS = {"version.torch": "2.13.0", "version.transformers": "5.23.0"}
MADE = {"error": None, "device": "cpu: x", **VERSIONS, "date": "2026-11-26T", "n_tokens": 30, "seconds.attack": 36.0}


def row(model="random:gpt2", corpus="rotten_tomatoes", size=1, attack="dager", rouge=1.0, **more):
    cell = {"model": model, "corpus": corpus, "batch_size": size, "attack": attack, "seed": 0}
    return {"key": str(more), **cell, **MADE, "rouge1": rouge, "rouge2": rouge / 2, **more}


def table(number, part=0):
    return [each for each in TABLES if each.number == number][part]


def lines_of(view, about):
    """The published line about something, and ours under it."""
    place = next(place for place, line in enumerate(view.lines) if line.about == about)
    end = next((p for p in range(place + 1, len(view.lines)) if view.lines[p].about), len(view.lines))
    return view.lines[place:end]


def test_a_published_line_has_a_figure_for_every_column_and_only_what_a_sweep_can_have():
    for each in TABLES:
        for line in each.rows:
            assert len(line.paper) == len(each.columns)
            assert {"model", "corpus", "attack"} <= set(line.where)
        wheres = [json.dumps(line.where, sort_keys=True) for line in each.rows]
        assert len(set(wheres)) == len(wheres)
    figure = re.compile(r"[\d.]+(±[\d.]+|\+[\d.]+-[\d.]+)?( / [\d.]+(±[\d.]+|\+[\d.]+-[\d.]+)?)?")
    assert all(figure.fullmatch(value) for each in TABLES for line in each.rows for value in line.paper if value)


def test_the_published_figures_say_what_the_paper_says_of_itself():
    """Facts of its text that hold only if the figures are in their places."""
    hours = {tuple(line.where.values()): line.paper for line in table(7).rows}
    lamp, dager = (float(hours["GPT-2", "rotten_tomatoes", attack][3]) for attack in ("lamp", "dager"))
    assert round(lamp / dager) == 19  # "20x"
    large = {tuple(line.where.values()): line.paper for line in table(3).rows}
    base = large["GPT-2", "rotten_tomatoes", "dager"]
    assert [figure.split(" / ")[0] for figure in base] == ["100", "98.0±1.7", "2.8±1.1", "0.0"]
    defaults = {table(4, part).rows[0].paper[place] for part, place in ((0, 2), (1, 2), (2, 1))}
    assert defaults == {"95.4±1.6 / 94.7±1.7"}


def test_ours_stand_under_the_published_and_the_rest_is_empty_and_said():
    ours = [row(rouge=1.0), row(rouge=0.8), row(size=2), row(attack="textbook", rouge=0.5), row(size=4, error="killed")]
    view = laid_out(table(2), ours)
    paper, first, second = lines_of(view, "GPT-2, Rotten Tomatoes, DAGER")
    assert paper.source == PAPER and paper.cells[2] == "99.3+0.7-1.7 / 99.3+0.7-1.8"
    assert (first.source, second.source) == ("ours: random:gpt2", "textbook: random:gpt2")
    assert first.cells == ("90.0±10.0 / 45.0±5.0 (2)", "100.0 / 50.0 (1)", "error", "")
    assert second.cells == ("50.0 / 25.0 (1)", "", "", "")
    assert [line.source for line in lines_of(view, "BERT, CoLA, LAMP")] == [PAPER, NOT_RUN]
    said = " ".join(view.remarks)
    assert "Of 72 published cells 3 have figures of ours" in said and "1 of our batches ended in an error" in said
    assert "PyTorch 2.13.0" in said and "below 10 batches" in said and published().source in said


def test_hours_and_models_that_the_paper_has_not():
    view = laid_out(table(7), [row(size=8), row("minilm-l6", "cola", 2)])
    assert lines_of(view, "GPT-2, Rotten Tomatoes, DAGER")[1].cells[3] == "1 (1)"
    [line] = lines_of(view, "minilm-l6, CoLA, DAGER")
    assert line.source == "ours: minilm-l6" and line.cells[1] == "1 (1)"
    both = [row("minilm-l6", "cola", 2), row("minilm-l6", "cola", 2, attack="textbook")]
    assert "Of 80 published cells 0 have figures of ours" in " ".join(laid_out(table(7), both).remarks)


def test_a_row_belongs_where_all_it_did_is_asked_for_and_nowhere_else():
    """Each of these does one thing that the others do not: none is in two places; plain tables take plain rows."""
    fedavg = {"training.epochs": 10, "training.learning_rate": 1e-4, "training.mini_batch": 4}
    special = {
        (4, 0): row(size=16, **fedavg),
        (5, 0): row(size=16, **{"client.task": "next_token"}),
        (8, 0): row(size=32, attack="textbook", **{"attack.rank_cutoff": 20}),
        (10, 0): row(**{"defence.noise.deviation": 5e-5}),
        (11, 0): row(size=16, **{"adapter.rank": 256}),
    }
    found = {
        place: [
            (line.source, cell)
            for line in laid_out(table(*place), [each]).lines
            for cell in line.cells
            if line.source not in (PAPER, NOT_RUN) and cell
        ]
        for place, each in special.items()
    }
    assert all(len(cells) == 1 for cells in found.values()), found
    for place, each in special.items():
        if place != (8, 0):  # the textbook's own option stands beside its figures
            assert all(line.source in (PAPER, NOT_RUN) for line in laid_out(table(3), [each]).lines), place
    where = {"model": "GPT-2", "corpus": "rotten_tomatoes", "attack": "dager"}
    shown = row(corpus="a/rotten_tomatoes.tsv", **{"model.blocks": 3, "client.share": "attention"})
    assert matches(shown, where, published())
    assert not matches(row(**{"client.dtype": "bfloat16"}), where, published())


def test_intervals_are_those_of_a_bootstrap():
    values = list(np.random.default_rng(1).uniform(0, 1, 100))
    mean, low, high = interval(values)
    assert mean == pytest.approx(np.mean(values))
    error = np.std(values) / 10
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)
    assert interval(values) == (mean, low, high) and printed([1.0]) == "1.0"


def test_names_of_strangers_are_text_in_both_forms():
    evil = row("<script>|*x*\n", size=16)
    view = laid_out(table(3), [evil])
    page = as_html([view], "title")
    assert "<script>" not in page and "&lt;script&gt;" in page
    ElementTree.fromstring(re.sub("<!DOCTYPE html>|<meta[^>]*>", "", page))
    text = as_markdown([view], "title")
    [line] = [line for line in text.splitlines() if "script" in line and "ours" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(view.columns) + 3 and "\\<script>\\|\\*x\\*↵" in line


CUTOFFS = ((20, 700, 1.0), (20, 760, 0.5), (40, 700, 0.9))  # rank cutoff, tokens, ROUGE-1
STARTS = ((1e-5, 90), (1e-4, 100))  # threshold, tokens that pass


@pytest.fixture
def rows(tmp_path):
    """Rows that belong into figures and Table 8, in a folder."""
    made = [
        row(size=32, n_tokens=tokens, rouge=rouge, attack="textbook", **{"attack.rank_cutoff": cutoff})
        for cutoff, tokens, rouge in CUTOFFS
    ]
    for threshold, first in STARTS:
        counted = {"attack.threshold_0": threshold, "starts.first": first, "starts.both": 30}
        made.append(row(size=32, attack="starts", **counted))
    made += [row("random:bert-base-uncased", size=size, n_tokens=20 * size) for size in (1, 4)]
    keyed = [{**each, "key": str(place)} for place, each in enumerate(made)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in keyed), "utf-8")
    return keyed


def test_tables_from_the_command_line(rows, tmp_path, capsys):
    record, page, text = tmp_path / "t.json", tmp_path / "t.html", tmp_path / "t.md"
    twice = (str(tmp_path), str(tmp_path / "rows.jsonl"))  # a cell that is in both counts once
    command = ["table", *twice, "--number", "8", "--json", str(record)]
    assert main([*command, "--html", str(page), "--markdown", str(text)]) == 0
    assert "Table 8" in page.read_text("utf-8") and "textbook: random:gpt2" in text.read_text("utf-8")
    [told] = json.loads(record.read_text("utf-8"))["tables"]
    assert ["", "75.0±25.0 (2)", "", ""] in [line["cells"] for line in told["lines"]]
    assert main(["table", str(tmp_path)]) == 0 and "Table 11" in capsys.readouterr().out
    assert main(["table", str(tmp_path), "--number", "6"]) == 2


def test_rows_of_defences_and_of_sweeps_are_not_mixed_up(rows, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "rows.jsonl"
    other.write_text('{"key": "a", "measure": "leakage"}\n', "utf-8")
    assert main(["table", str(tmp_path), str(other)]) == 2
    assert "dager sweep" in capsys.readouterr().err
    assert main(["defend", "table", str(tmp_path)]) == 2
    assert "dager defend" in capsys.readouterr().err


def test_figures_from_rows(rows, tmp_path):
    picture = tmp_path / "figure.svg"
    for figure in (2, 3, 4):
        assert main(["plot", str(tmp_path), "--figure", str(figure), "--picture", str(picture)]) == 0
        assert "<svg" in picture.read_text("utf-8")
    assert main(["plot", str(tmp_path), "--figure", "1", "--picture", str(picture)]) == 2
    both = curves_of(2, rows).points
    assert both == {"ours, first test": list(STARTS), "ours, both tests": [(t, 30) for t, _ in STARTS]}
    assert curves_of(3, rows).points["textbook: random:gpt2 (rank_cutoff 20)"] == [(700, 100), (760, 50)]
    assert set(curves_of(4, rows).points) == {f"ours: random:bert-base-uncased, B = {size}" for size in (1, 4)}
    assert "it was not run" in curves_of(4, []).note
