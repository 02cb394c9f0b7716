"""The published figures and the layout of their tables, read from the file beside this one.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class PaperRow:
    """A line of a table of the paper.

    Attributes:
        name: What stands in front of it, where model, corpus and attack do not say it.
        where: What its rows of a sweep have: `model` and `attack` by the paper's names, `corpus`, dotted options.
        paper: The figures as printed, one a column; None where there is none.
    """

    name: str | None
    where: Mapping[str, Any]
    paper: Sequence[str | None]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or one part of it.

    Attributes:
        number: Its number in the paper.
        title: What it compares.
        measure: What its cells hold: `rouge` (ROUGE-1 / ROUGE-2), `rouge1` or `hours`.
        columns: By heading, what the column's rows of a sweep have besides.
        rows: Its lines.
        remarks: What a reader must know.
    """

    number: int
    title: str
    measure: str
    columns: Mapping[str, Mapping[str, Any]]
    rows: Sequence[PaperRow]
    remarks: Sequence[str]


@dataclass(frozen=True)
class Published:
    """All of it.

    Attributes:
        source: The paper.
        models: By the paper's name, the names under which a sweep may have the model.
        attacks: By the paper's name, the attacks of a sweep that stand for it.
        tables: In the paper's order.
        figures: By number, what is known of a figure.
    """

    source: str
    models: Mapping[str, Sequence[str]]
    attacks: Mapping[str, Sequence[str]]
    tables: Sequence[PaperTable]
    figures: Mapping[int, Mapping[str, Any]]


@functools.cache
def published() -> Published:
    """Read the file.

    >>> sorted({table.number for table in published().tables})
    [2, 3, 4, 5, 7, 8, 10, 11]
    """
    text = resources.files("dager_tutorial.evaluation.tables").joinpath("published.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    tables = tuple(map(_table, content["tables"]))
    return Published(content["source"], content["models"], content["attacks"], tables, content["figures"])


def _table(content: Mapping[str, Any]) -> PaperTable:
    rows = tuple(
        PaperRow(row.get("name"), row["where"], tuple(None if each is None else str(each) for each in row["paper"]))
        for row in content["rows"]
    )
    fixed = {"rows": rows, "remarks": tuple(content.get("remarks", ()))}
    return PaperTable(**{**content, **fixed})
