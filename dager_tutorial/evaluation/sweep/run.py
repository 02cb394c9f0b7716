"""A sweep: do the cells that have no row yet, and store each row before the next is waited for.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import joblib

from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.sweep.cells import Cell, distinct, key_of
from dager_tutorial.evaluation.sweep.pool import Engine
from dager_tutorial.evaluation.sweep.store import Row, Store

Compute = Callable[[Cell], Mapping[str, Any]]
"""What does a cell: must be picklable where there are several workers."""


def missing(cells: Iterable[Cell], store: Store, *, retry: bool = False) -> list[Cell]:
    """The cells that have no row yet, each once.

    Args:
        cells: All that are wanted.
        store: What is there.
        retry: Whether rows that tell of an error count as none.
    """
    done = {key for key, row in store.rows.items() if not (retry and row.get("error"))}
    return [cell for key, cell in distinct(cells).items() if key not in done]


def run_sweep(cells: Sequence[Cell], compute: Compute, store: Store, engine: Engine | None = None) -> Iterator[Row]:
    """Do cells and store their rows.

    Args:
        cells: Cells without rows (see `missing`).
        compute: Does a cell. What it raises becomes the row's `error`, and the sweep goes on.
        store: Where rows go; each is on the disk before it is yielded.
        engine: Who does them; this process if left out.

    Yields:
        Each row, as it comes.

    Raises:
        DagerError: The engine cannot be had, or a worker was killed. Rows stored so far stay.
    """
    engine = engine or Engine()
    with engine.pool() as pool:
        for row in pool(joblib.delayed(row_of)(compute, cell) for cell in cells):
            if row["key"] not in store.rows or store.rows[row["key"]].get("error"):
                store.append(row)
                yield row


def row_of(compute: Compute, cell: Cell) -> Row:
    """A cell's row: its key, the cell, what was measured, when, and how long all of it took.

    Args:
        compute: See `run_sweep`.
        cell: The cell.
    """
    begin = time.perf_counter()
    try:
        measured: dict[str, Any] = {**compute(cell), "error": None}
    except Exception as error:  # a sweep outlives whatever its cells die of; KeyboardInterrupt is none
        said = str(error) if isinstance(error, DagerError) else f"{type(error).__name__}: {error}"
        measured = {"error": " ".join(said.split())[:500]}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"key": key_of(cell), **cell, **measured, "date": now, "seconds.cell": time.perf_counter() - begin}


class Estimate:
    """How long the rest of a sweep will take, from what cells of the same kind took.

    Example:
        >>> cells = [{"model": "a", "batch_size": size, "seed": seed} for size in (1, 2) for seed in (0, 1)]
        >>> estimate = Estimate(cells)
        >>> estimate.add({"model": "a", "batch_size": 1, "seed": 0, "seconds.cell": 2.0})
        >>> estimate.add({"model": "a", "batch_size": 2, "seed": 0, "seconds.cell": 6.0})
        >>> estimate.seconds(workers=2)
        4.0
    """

    def __init__(self, cells: Iterable[Cell]):
        self.left = Counter(map(_kind, cells))
        self.took: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """Learn from the row of one of the cells.

        Args:
            row: What `run_sweep` yielded.
        """
        kind = _kind(row)
        self.left[kind] -= 1
        self.took[kind].append(row["seconds.cell"])

    def seconds(self, workers: int = 1) -> float | None:
        """Seconds that are left; None where nothing is known yet.

        Args:
            workers: How many work.
        """
        means = {kind: sum(times) / len(times) for kind, times in self.took.items()}
        if not means:
            return None
        usual = sum(means.values()) / len(means)
        return sum(count * means.get(kind, usual) for kind, count in self.left.items()) / max(1, workers)


def _kind(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """What decides how long a cell takes."""
    return tuple(str(cell.get(name)) for name in ("model", "model.blocks", "batch_size", "attack", "training.epochs"))
