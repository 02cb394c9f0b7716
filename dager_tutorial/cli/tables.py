"""`dager table` and `dager plot`: the paper's tables and figures from rows of `dager sweep`, ours beside its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Group, RenderableType
from rich.text import Text
from typer import Argument, Option

from dager_tutorial.cli import display, output
from dager_tutorial.cli.options import Markdown, OutputOptions, flattened
from dager_tutorial.cli.picture import drawable
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.evaluation.sweep.store import Row
    from dager_tutorial.evaluation.tables.layout import View

TITLE = "The tables of the DAGER paper, remade"
FIGURES = (2, 3, 4)

Rows = Annotated[list[Path], Argument(metavar="ROWS...", help="Folders or files of rows, as dager sweep writes them.")]


@flattened
def table(
    *,
    rows: Rows,
    number: Annotated[
        list[int] | None, Option("--number", help="Number of a table in the paper; repeat it. All by default.")
    ] = None,
    markdown: Markdown = None,
    html: Annotated[
        Path | None, Option("--html", callback=output.writable, help="Write the tables as a page of HTML.")
    ] = None,
    results: OutputOptions,
) -> None:
    """Lay out tables 2, 3, 4, 5, 7, 8, 10 and 11 of the paper with our figures under the published ones."""
    found = _read(rows)
    from dager_tutorial.evaluation.tables import rendering
    from dager_tutorial.evaluation.tables.layout import laid_out
    from dager_tutorial.evaluation.tables.published import published

    known = sorted({each.number for each in published().tables})
    wanted = number or known
    if not set(wanted) <= set(known):
        raise DagerError(f"--number: there are tables {', '.join(map(str, known))}")
    views = [laid_out(each, found) for each in published().tables if each.number in wanted]
    if markdown is not None:
        output.write_text(markdown, rendering.as_markdown(views, TITLE))
    if html is not None:
        output.write_text(html, rendering.as_html(views, TITLE))
    shown = [] if markdown or html else [part for view in views for part in _shown(view)]
    results.finish({"tables": [_record(view) for view in views]}, *shown)


@flattened
def plot(
    *,
    rows: Rows,
    figure: Annotated[int, Option("--figure", help=f"Number in the paper: {', '.join(map(str, FIGURES))}.")],
    picture: Annotated[Path, Option("--picture", callback=drawable, help="The file to draw (.png, .svg or .pdf).")],
    results: OutputOptions,
) -> None:
    """Draw figures 2, 3 and 4 of the paper from rows, with what was published of them."""
    if figure not in FIGURES:
        raise DagerError(f"--figure is {figure}: there are figures {', '.join(map(str, FIGURES))}")
    found = _read(rows)
    from dager_tutorial.cli.picture import draw_figure
    from dager_tutorial.evaluation.tables.curves import curves_of

    curves = curves_of(figure, found)
    draw_figure(picture, curves)
    results.finish({"picture": str(picture), "points": {name: len(points) for name, points in curves.points.items()}})


def _read(places: list[Path]) -> list[Row]:
    """The rows of all places, each cell once."""
    from dager_tutorial.evaluation.sweep.store import read_rows

    found: dict[str, Row] = {}
    for place in places:
        rows = read_rows(place)
        if any("attack" not in row for row in rows):
            raise DagerError(
                f"{place} holds rows of no sweep: name folders of `dager sweep`; `defend table` has others"
            )
        found |= {row["key"]: row for row in rows}
    return list(found.values())


def _record(view: View) -> dict[str, object]:
    lines = [{"about": line.about, "figures": line.source, "cells": list(line.cells)} for line in view.lines]
    return {"title": view.title, "columns": list(view.columns), "lines": lines, "remarks": list(view.remarks)}


def _shown(view: View) -> tuple[RenderableType, ...]:
    """A table for the terminal."""
    shown = display.headed("setting", "figures", *view.columns, left=("setting", "figures"), collapse_padding=True)
    for column in shown.columns:
        column.no_wrap, column.overflow = False, "fold"
    for line in view.lines:
        shown.add_row(*(Text(cell) for cell in (line.about, line.source, *line.cells)))
    return display.heading(view.title), shown, Group(*(Text(f"- {remark}", "dim") for remark in view.remarks), "")
