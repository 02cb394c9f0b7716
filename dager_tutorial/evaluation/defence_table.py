"""The rows of defences as Markdown: what comes back beside what is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from dager_tutorial.evaluation.tables.statistics import printed

Row = Mapping[str, Any]
Z = 1.959964  # of a standard normal: 95 % lie within


def wilson(right: int, tests: int) -> tuple[float, float]:
    """The 95 % interval of a share, as Wilson gives it.

    Args:
        right: How many of the tests went well.
        tests: How many there were.

    Example:
        >>> [round(end, 3) for end in wilson(80, 100)]
        [0.711, 0.867]
    """
    share, spread = right / tests, Z * Z / tests
    middle, half = share + spread / 2, Z * math.sqrt(share * (1 - share) / tests + spread / (4 * tests))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def markdown_table(rows: Sequence[Row]) -> str:
    """Both tables: every defence against both attackers with the accuracy beside it, and what learning took.

    Args:
        rows: Of `defending.leakage_row` and `utility.utility_row`, with the parameters that name them.

    Returns:
        Markdown. Shares are means over the seeds of a cell, in per cent, with their intervals; accuracies are over all
        runs' tests together.
    """
    rows = [row for row in rows if not row.get("error")]
    leaks = _cells((row for row in rows if row["measure"] == "leakage"), ("model", "blocks", "batch_size", "defence"))
    learned = _cells((row for row in rows if row["measure"] == "utility"), ("model", "blocks", "defence"))
    models = sorted({(model, blocks) for model, blocks, _ in learned}, key=str)
    accuracies = [f"accuracy {_model(*each)}" for each in models]
    lines = _head(["model", "B", "defence", *LEAKAGE, *accuracies])
    for (model, blocks, size, defence), cell in leaks.items():
        beside = [_accuracy(learned.get((*each, defence), [])) for each in models]
        lines.append(_line([_model(model, blocks), size, defence, *(show(cell) for show in LEAKAGE.values()), *beside]))
    lines += ["", *_head(["model", "defence", *LEARNING])]
    for (model, blocks, defence), cell in learned.items():
        lines.append(_line([_model(model, blocks), defence, *(show(cell) for show in LEARNING.values())]))
    return "\n".join(lines) + "\n"


def _share(name: str) -> Callable[[Sequence[Row]], str]:
    return lambda cell: printed([100 * row[name] for row in cell])


def _number(name: str, form: str) -> Callable[[Sequence[Row]], str]:
    return lambda cell: format(mean(row[name] for row in cell), form) if name in cell[0] else ""


def _words(name: str) -> Callable[[Sequence[Row]], str]:
    return lambda cell: ", ".join(dict.fromkeys(f"`{row[name]}`" for row in cell))


def _accuracy(cell: Sequence[Row]) -> str:
    """The share of right answers, with its interval."""
    if not cell:
        return ""
    right, tests = sum(row["right"] for row in cell), sum(row["tests"] for row in cell)
    low, high = wilson(right, tests)
    return f"{100 * right / tests:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


LEAKAGE: dict[str, Callable[[Sequence[Row]], str]] = {
    "batches": lambda cell: str(len(cell)),
    "\\|g\\|": _number("gradient_norm", ".3g"),
    "sigma / \\|g\\|": _number("noise_over_norm", ".1e"),
    "entries sent": lambda cell: f"{100 * mean(row['entries_kept'] / row['entries'] for row in cell):.1f} %",
    "MB": lambda cell: f"{mean(row['bytes'] for row in cell) / 1e6:.1f}",
    "fixed: exact": _share("fixed_exact"),
    "ROUGE-1, 2 (fixed)": lambda cell: f"{_share('fixed_rouge1')(cell)}, {_share('fixed_rouge2')(cell)}",
    "adaptive: exact": _share("adaptive_exact"),
    "ROUGE-1, 2": lambda cell: f"{_share('adaptive_rouge1')(cell)}, {_share('adaptive_rouge2')(cell)}",
    "tokens": _share("adaptive_recall"),
    "confirmed": _share("adaptive_confirmed"),
    "false": lambda cell: str(sum(row["adaptive_false"] + row["fixed_false"] for row in cell)),
    "status": _words("adaptive_status"),
}
LEARNING: dict[str, Callable[[Sequence[Row]], str]] = {
    "runs": lambda cell: str(len(cell)),
    "accuracy": _accuracy,
    "seconds": _number("seconds", ".0f"),
    "MB an update": lambda cell: f"{mean(row['bytes'] for row in cell) / 1e6:.2f}",
    "epsilon": _number("epsilon", ".3g"),
    "delta": _number("delta", ".0e"),
    "multiplier": _number("noise_multiplier", ".3g"),
    "one-release multiplier": _number("one_release_multiplier", ".3g"),
}


def _cells(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that differ in their seeds alone, by what they share."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return cells


def _model(name: str, blocks: int | None) -> str:
    return name if blocks is None else f"{name}, {blocks} blocks"


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(values: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, values))} |"
