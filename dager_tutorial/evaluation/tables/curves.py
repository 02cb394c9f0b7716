"""What figures 2, 3 and 4 of the paper show, from rows of a sweep: points by curve, and what was published of them.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from dager_tutorial.evaluation.tables.matching import Row, matches, whose
from dager_tutorial.evaluation.tables.published import published

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """A figure's content.

    Attributes:
        title: With its number in the paper.
        across: Title of the lower axis.
        up: Title of the other one.
        points: Ours, by curve, from left to right.
        paper: The published points, by curve.
        levels: Published values that hold over a range.
        width: Where the rank reaches the model's width, or None.
        logarithmic: Whether both axes are.
        note: What a reader must know.
    """

    title: str
    across: str
    up: str
    points: Mapping[str, Points]
    paper: Mapping[str, Points]
    levels: Mapping[str, float]
    width: float | None
    logarithmic: bool
    note: str


def curves_of(number: int, rows: Sequence[Row]) -> Curves:
    """The content of a figure.

    Args:
        number: 2, 3 or 4.
        rows: All rows of a sweep; those that belong here are found.
    """
    told = published().figures[number]
    thresholds = number == 2
    points = _starts(rows) if thresholds else _rouge(rows, {3: "GPT-2", 4: "BERT"}[number], by_size=number == 4)
    run = "" if points else " No row of ours belongs here: it was not run."
    return Curves(
        title=f"Figure {number}. {told['title']}",
        across="threshold" if thresholds else "tokens of the batch",
        up="tokens that pass" if thresholds else "ROUGE-1, per cent",
        points=points,
        paper={name: [(x, y) for x, y in pairs] for name, pairs in told.get("points", {}).items()},
        levels=told.get("levels", {}),
        width=told.get("width"),
        logarithmic=thresholds,
        note=told["note"] + run,
    )


def _rouge(rows: Sequence[Row], model: str, *, by_size: bool) -> dict[str, Points]:
    """ROUGE-1 of every batch against its tokens, one curve for each attack and its options (and batch size)."""
    curve = (lambda row: f"{whose(row)}, B = {row['batch_size']}") if by_size else whose
    return _curves(
        _of(rows, {"model": model, "attack": "dager"}), curve, lambda row: (row["n_tokens"], 100 * row["rouge1"])
    )


def _starts(rows: Sequence[Row]) -> dict[str, Points]:
    """Starting tokens that pass at each threshold, by one test and by both."""
    found = [row for row in _of(rows, {"model": "GPT-2", "attack": "starts"}) if row["batch_size"] == 32]
    columns = {"ours, first test": "starts.first", "ours, both tests": "starts.both"}
    return {
        name: sorted((row["attack.threshold_0"], row[column]) for row in found)
        for name, column in columns.items()
        if found
    }


def _of(rows: Iterable[Row], where: Mapping[str, str]) -> list[Row]:
    """Rows without errors of a model and an attack, on any corpus."""
    return [
        row
        for row in rows
        if not row["error"] and matches(row, {**where, "corpus": PurePath(row["corpus"]).stem}, published())
    ]


def _curves(
    rows: Iterable[Row], curve: Callable[[Row], str], point: Callable[[Row], tuple[float, float]]
) -> dict[str, Points]:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        found[curve(row)].append(point(row))
    return {name: sorted(points) for name, points in sorted(found.items())}
