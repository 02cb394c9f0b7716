"""A table of the paper with our figures under the published ones; what was not run stays empty and is counted.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dager_tutorial.evaluation.tables.matching import Row, matches, whose
from dager_tutorial.evaluation.tables.published import PaperRow, PaperTable, Published, published
from dager_tutorial.evaluation.tables.statistics import printed

CORPORA = {"cola": "CoLA", "sst2": "SST-2", "rotten_tomatoes": "Rotten Tomatoes"}
ATTACKS = {"dager": "DAGER", "tag": "TAG", "lamp": "LAMP", "dlg": "DLG"}

PAPER = "paper"
NOT_RUN = "ours: not run"
FEW = 10
"""Batches below which an interval says little."""


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        about: What it is about: model, corpus and attack as the paper calls them; empty where the line above says it.
        source: Whose figures: the paper's, or ours and on what.
        cells: One a column, "" where there is nothing.
    """

    about: str
    source: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A table to be shown.

    Attributes:
        title: With its number in the paper.
        columns: Headings of the cells.
        lines: From top to bottom.
        remarks: What a reader must know, below it.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]


def laid_out(table: PaperTable, rows: Sequence[Row]) -> View:
    """Lay out a table.

    Args:
        table: What the paper has.
        rows: All rows of a sweep; those that belong here are found.
    """
    known, lines, used = published(), list[Line](), list[Row]()
    for paper_row in [*table.rows, *_foreign(table, rows, known)]:
        found = _by_column(table, paper_row, rows, known)
        used += [row for each in found for row in each]
        lines += _lines(table, paper_row, found)
    return View(
        f"Table {table.number}. {table.title}", tuple(table.columns), tuple(lines), _remarks(table, lines, used, known)
    )


def _by_column(table: PaperTable, paper_row: PaperRow, rows: Sequence[Row], known: Published) -> list[list[Row]]:
    """The rows of a sweep that belong into each cell."""
    wheres = ({**paper_row.where, **column} for column in table.columns.values())
    return [[row for row in rows if matches(row, where, known)] for where in wheres]


def _lines(table: PaperTable, paper_row: PaperRow, found: Sequence[Sequence[Row]]) -> list[Line]:
    """The published line, and one for each model and kind of attack of ours."""
    asked = {name for column in table.columns.values() for name in column} | set(paper_row.where)
    owners = list(dict.fromkeys(whose(row, asked) for each in found for row in each))
    ours = [
        (owner, tuple(_cell(table.measure, [row for row in each if whose(row, asked) == owner]) for each in found))
        for owner in owners
    ]
    paper = [(PAPER, tuple(each or "" for each in paper_row.paper))] if paper_row.paper else []
    about = [_about(paper_row), *[""] * len(ours)]
    lines = [*paper, *(ours or [(NOT_RUN, ("",) * len(found))])]
    return [Line(said, *line) for said, line in zip([*about, ""], lines, strict=False)]


def _about(paper_row: PaperRow) -> str:
    if paper_row.name:
        return paper_row.name
    where = paper_row.where
    corpus, attack = (names.get(where[key], where[key]) for key, names in (("corpus", CORPORA), ("attack", ATTACKS)))
    return f"{where['model']}, {corpus}, {attack}"


def _foreign(table: PaperTable, rows: Sequence[Row], known: Published) -> list[PaperRow]:
    """Lines for models that the paper has not, wherever a line of it, with its model left out, has rows of theirs."""
    ours = {name for names in known.models.values() for name in names}
    models = dict.fromkeys(row["model"] for row in rows if row["model"] not in ours)
    kinds = {tuple(sorted({**row.where, "model": ""}.items())): row for row in table.rows}.values()
    lines = [PaperRow(None, {**row.where, "model": model}, ()) for model in models for row in kinds]
    return [line for line in lines if any(_by_column(table, line, rows, known))]


def _cell(measure: str, rows: Sequence[Row]) -> str:
    """Our figure, with the number of batches that it is a mean of."""
    done = [row for row in rows if not row["error"]]
    if not done:
        return "error" if rows else ""
    return f"{MEASURES[measure](done)} ({len(done)})"


def _percent(rows: Sequence[Row], name: str) -> str:
    return printed([100 * row[name] for row in rows])


def _hours(rows: Sequence[Row]) -> str:
    """Hours that a hundred such batches take, to two digits that tell."""
    hours = [row["seconds.attack"] * 100 / 3600 for row in rows]
    return f"{sum(hours) / len(hours):.2g}"


MEASURES = {
    "rouge": lambda rows: f"{_percent(rows, 'rouge1')} / {_percent(rows, 'rouge2')}",
    "rouge1": lambda rows: _percent(rows, "rouge1"),
    "hours": _hours,
}


def _remarks(table: PaperTable, lines: Sequence[Line], used: Sequence[Row], known: Published) -> tuple[str, ...]:
    """What holds for the table, what was not run, and on what ours were made."""
    there = sum(bool(cell) for line in lines if line.source == PAPER for cell in line.cells)
    run = _compared(lines)
    said = [
        f"Published figures: {known.source}.",
        *table.remarks,
        f"Of {there} published cells {run} have figures of ours beside them; the others were not run and are empty.",
    ]
    if used:
        said.append(f"In brackets: batches of ours. Intervals: 95 %, by a bootstrap over batches{_few(used)}")
        said.append(f"Ours: {', '.join(_made_on(used))}.")
    failed = [row for row in used if row["error"]]
    if failed:
        said.append(f"{len(failed)} of our batches ended in an error and are left out: {failed[0]['error']}.")
    return tuple(said)


def _compared(lines: Sequence[Line]) -> int:
    """How many published cells have a figure of ours below them."""
    number, paper, have = 0, tuple[str, ...](), set[int]()
    for line in [*lines, Line("", PAPER, ())]:
        if line.source == PAPER or line.about:  # lines of a model that the paper has not begin with what they are about
            number += len(have)
            paper, have = line.cells if line.source == PAPER else (), set()
        else:
            have |= {place for place, cell in enumerate(line.cells) if cell and place < len(paper) and paper[place]}
    return number


def _few(used: Sequence[Row]) -> str:
    counts = Counter((row["corpus"], row["batch_size"], whose(row)) for row in used)
    return f"; below {FEW} batches they say little." if min(counts.values()) < FEW else "."


def _made_on(used: Sequence[Row]) -> list[str]:
    """Devices, versions and dates of rows, each once."""
    said = []
    for name, title in {"device": "", "version.torch": "PyTorch ", "version.transformers": "transformers "}.items():
        said += [f"{title}{value}" for value in sorted({row[name] for row in used if name in row})]
    dates = sorted(str(row["date"])[:10] for row in used)
    return [*said, dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"]
