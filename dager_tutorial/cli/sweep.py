"""`dager sweep`: a grid of batches, clients and attacks, one row each, from one core to a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer import Argument, Option

from dager_tutorial.cli import display
from dager_tutorial.cli.options import Device, OutputOptions, Rows, Threads, flattened
from dager_tutorial.errors import DagerError, printable

if TYPE_CHECKING:
    from dager_tutorial.evaluation.sweep.cells import Cell
    from dager_tutorial.evaluation.sweep.pool import Engine
    from dager_tutorial.evaluation.sweep.run import Estimate
    from dager_tutorial.evaluation.sweep.store import Row


@dataclass(frozen=True)
class EngineOptions:
    """Who does the cells."""

    engine: Annotated[
        Literal["local", "dask", "ray"], Option("--engine", help="Local processes, or a cluster's workers.")
    ] = "local"
    address: Annotated[
        str | None, Option("--address", help="The cluster's scheduler, such as tcp://127.0.0.1:8786.")
    ] = None
    workers: Annotated[
        int | None, Option("--workers", min=1, help="Local processes; as many as cores, memory and GPUs allow.")
    ] = None

    def choose(self, cells: list[Cell], device: str) -> Engine:
        """The engine, with no more workers than memory and GPUs allow.

        Args:
            cells: What is to be done.
            device: On what.

        Raises:
            DagerError: A cell fits nowhere, or the options contradict each other.
        """
        from dager_tutorial.evaluation.sweep.pool import Engine

        if self.engine != "local":
            if self.workers is not None:
                raise DagerError(f"--workers counts local processes: the cluster of --engine {self.engine} has its own")
            return Engine(self.engine, address=self.address)
        if self.address is not None:
            raise DagerError("--address belongs to --engine dask or ray")
        from dager_tutorial.evaluation.sweep.workers import affordable

        most = affordable(cells, device)
        if self.workers is not None and self.workers > most:
            typer.echo(f"dager: {self.workers} workers do not fit: there will be {most}", err=True)
        return Engine(workers=min(self.workers or most, most))


@flattened
def sweep(
    *,
    grid: Annotated[Path | None, Argument(metavar="[GRID]", help="A YAML file of grids; see docs/sweeps.md.")] = None,
    vary: Annotated[
        list[str] | None,
        Option("--vary", help="An axis and its values, as batch_sizes=1,2 or models=random:gpt2; overrules GRID."),
    ] = None,
    rows: Rows,
    texts: Annotated[
        Path | None, Option("--texts", help="Folder of TSV files by the names of corpora, looked into first.")
    ] = None,
    engine: EngineOptions,
    device: Device = "cpu",
    threads: Threads = None,
    retry: Annotated[bool, Option("--retry", help="Do the cells again whose rows tell of an error.")] = False,
    results: OutputOptions,
) -> None:
    """Do every cell of a grid that has no row yet: capture, attack, score."""
    cells, source = _asked(grid, vary or [])
    from dager_tutorial.evaluation.sweep.cell import Work
    from dager_tutorial.evaluation.sweep.records import check_cells
    from dager_tutorial.evaluation.sweep.run import Estimate, missing, run_sweep
    from dager_tutorial.evaluation.sweep.store import Store

    check_cells(cells, source)
    work = Work(device, None if texts is None else str(texts.absolute()), threads)
    with Store(rows) as store:
        todo = missing(cells, store, retry=retry)
        _begin(store.damaged, len(cells), len(todo), rows)
        chosen = engine.choose(todo, device)
        failed, estimate = 0, Estimate(todo)
        with _bar(len(todo), estimate, chosen.workers) as advance:
            for row in run_sweep(todo, work, store, chosen):
                failed += row["error"] is not None
                advance(row)
    record = {"rows": str(rows), "cells": len(cells), "done": len(todo), "failed": failed, "workers": chosen.workers}
    results.finish(record, display.facts(record))


def _asked(grid: Path | None, vary: list[str]) -> tuple[list[Cell], str]:
    """The cells of a file whose axes the command line overrules, and where they come from."""
    from dager_tutorial.evaluation.sweep.grid import cells_of, read_axes, read_grids

    axes = read_axes(vary)
    if grid is None and not axes:
        raise DagerError("give a YAML file of grids, or axes with --vary")
    source = "--vary" if grid is None else str(grid)
    return cells_of([{**each, **axes} for each in (read_grids(grid) if grid else [{}])], source), source


def _begin(damaged: int, all_cells: int, todo: int, rows: Path) -> None:
    """Say what was found and what is to be done."""
    if damaged:
        typer.echo(f"dager: {rows}: {damaged} damaged line(s) set aside, as a kill leaves them; done again", err=True)
    typer.echo(f"{all_cells} cells, {all_cells - todo} have rows, {todo} to do")


@contextmanager
def _bar(total: int, estimate: Estimate, workers: int) -> Iterator[Any]:
    """A bar with an estimate of what is left, where somebody watches; a line for each row, printed above it."""
    console = Console(stderr=True)
    shown = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=total)

        def advance(row: Row) -> None:
            estimate.add(row)
            left = estimate.seconds(workers)
            said = "" if left is None else f"about {_duration(left)} left"
            bars.update(task, advance=1, description=said)
            typer.echo(_line(row))

        yield advance


def _duration(seconds: float) -> str:
    """Seconds for people.

    >>> _duration(42.4), _duration(600), _duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _line(row: Row) -> str:
    """One row in one line."""
    what = f"{row['model']}  {row['corpus']}  B={row['batch_size']}  seed={row['seed']}  {row['attack']}"
    from dager_tutorial.evaluation.sweep.cells import options_of

    others = [f"{name}={value}" for name, value in options_of(row).items()]
    if row["error"] is not None:
        came = f"error: {row['error']}"
    else:
        came = f"R1={row['rouge1']:.3f}  exact={row['exact']:.3f}  {row['status']}  {row['seconds.attack']:.1f} s"
    return printable("  ".join([what, *others, came]))
