"""`dager defend`: every defence against two attackers, and what it costs; rows that are there are not made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from dager_tutorial.cli import output
from dager_tutorial.cli.defenses import DefenseOptions
from dager_tutorial.cli.options import (
    ClientOptions,
    Markdown,
    ModelOptions,
    OutputOptions,
    Rows,
    Seed,
    SeriesOptions,
    TimeBudget,
    flattened,
)
from dager_tutorial.cli.tables import Rows as Read
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.evaluation.defending import Cell
    from dager_tutorial.models.language_model import LanguageModel

UNDEFENDED, CLIENT = DefenseOptions(), ClientOptions()

app = typer.Typer(help="Measure what defences stop and what they cost.", no_args_is_help=True)


@app.command()
@flattened
def leakage(
    *,
    model: ModelOptions,
    series: SeriesOptions,
    rows: Rows,
    client: ClientOptions = CLIENT,
    defences: DefenseOptions = UNDEFENDED,
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Attack updates behind a defence, or behind all usual ones: with fixed thresholds, and adaptively."""
    batches = {(each.data, len(each.texts), each.seed): each for each in series.draw(seed)}
    from dager_tutorial.evaluation.defending import leakage_row
    from dager_tutorial.server.budget import AttackConfig

    defended = {cell.name: cell for cell in _cells(defences)}
    shared = {"measure": "leakage", **_model(model), **vars(client), "time_budget": time_budget}
    wanted = [
        shared | {"data": data, "batch_size": size, "seed": each, "defence": name}
        for name in defended
        for data, size, each in batches
    ]
    limits = AttackConfig(time_budget=time_budget)

    def measure(loaded: LanguageModel, row: Mapping[str, Any]) -> dict[str, Any]:
        batch, cell = batches[row["data"], row["batch_size"], row["seed"]], defended[row["defence"]]
        return leakage_row(loaded, batch, cell, config=client.config(batch.seed), limits=limits)

    results.finish(_measured(model, rows, wanted, measure, _leak_line))


@app.command()
@flattened
def utility(
    *,
    model: ModelOptions,
    data: Annotated[str, Option("--data", help="Texts by name, or a TSV file.")] = "reviews",
    runs: Annotated[int, Option("--runs", min=1, help="Runs of each defence, seeds counted up.")] = 3,
    updates: Annotated[int, Option("--updates", min=1, help="Updates of a run, which AdamW applies.")] = 60,
    learning_rate: Annotated[float, Option("--learning-rate", min=1e-12, max=10.0, help="Of AdamW.")] = 1e-4,
    tests: Annotated[int, Option("--tests", min=1, help="Texts held out.")] = 96,
    rows: Rows,
    defences: DefenseOptions = UNDEFENDED,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Fine-tune the model by updates behind a defence, or behind all usual ones, and count what it gets right."""
    if (defences.sample_rate, defences.steps) != (1.0, 1):
        raise DagerError("--sample-rate and --steps are those of the training here: leave them out")
    from dager_tutorial.data import load_texts

    examples = load_texts(data)
    from dager_tutorial.evaluation.utility import Training, utility_row

    how = Training(updates, learning_rate=learning_rate, tests=tests)
    defended = {cell.name: cell for cell in _cells(defences)}
    shared = {"measure": "utility", **_model(model), "data": Path(data).stem, **vars(how)}
    wanted = [shared | {"seed": each, "defence": name} for name in defended for each in range(seed, seed + runs)]

    def measure(loaded: LanguageModel, row: Mapping[str, Any]) -> dict[str, Any]:
        return utility_row(loaded, examples, defended[row["defence"]], row["seed"], how)

    results.finish(_measured(model, rows, wanted, measure, _learn_line))


@app.command()
@flattened
def table(
    *,
    rows: Read,
    markdown: Markdown = None,
    results: OutputOptions,
) -> None:
    """Put rows together: what comes back behind every defence, beside what is learned with it."""
    from dager_tutorial.evaluation.defence_table import markdown_table
    from dager_tutorial.evaluation.sweep.store import read_rows

    found = [row for path in rows for row in read_rows(path)]
    if any("measure" not in row for row in found):
        raise DagerError("there are rows of no defence: name what `dager defend` wrote; `dager table` reads sweeps")
    written = markdown_table(found)
    if markdown is not None:
        output.write_text(markdown, written)
    results.finish({"rows": found})
    typer.echo(written)


def _measured(
    model: ModelOptions,
    folder: Path,
    wanted: list[dict[str, Any]],
    measure: Callable[[LanguageModel, Mapping[str, Any]], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Measure what has no row yet, and say each row as it comes."""
    from dager_tutorial.evaluation.sweep.run import missing, run_sweep
    from dager_tutorial.evaluation.sweep.store import Store

    made: list[dict[str, Any]] = []
    with Store(folder) as store:
        todo = missing(wanted, store, retry=True)
        for row in run_sweep(todo, partial(measure, model.load()), store) if todo else ():
            made.append(row)
            typer.echo(f"{row['defence']}: {row['error']}" if row["error"] else line(row))
    typer.echo(f"{len(made)} rows made, {len(wanted) - len(made)} were there")
    return {"rows": str(folder), "made": made}


def _learn_line(row: dict[str, Any]) -> str:
    """A row of a task in one line."""
    return f"seed={row['seed']}  right={row['right']}/{row['tests']}  {row['seconds']:.0f} s  {row['defence']}"


def _model(model: ModelOptions) -> dict[str, Any]:
    """What names a model in a row."""
    return {"model": model.model, "model_seed": model.model_seed, "blocks": model.blocks}


def _cells(defences: DefenseOptions) -> tuple[Cell, ...]:
    """The defence that was given, or all usual ones."""
    from dager_tutorial.evaluation.defending import Cell, usual_cells

    return usual_cells() if defences == UNDEFENDED else (Cell(defences.protection()),)


def _leak_line(row: dict[str, Any]) -> str:
    """A row in one line."""
    parts = [f"{row['data']}  B={row['batch_size']}  seed={row['seed']}  tokens={row['tokens']}"]
    parts += [f"|g|={row['gradient_norm']:.3g}  noise/|g|={row['noise_over_norm']:.1e}  kept={row['entries_kept']}"]
    for name in ("fixed", "adaptive"):
        found = {key: row[f"{name}_{key}"] for key in ("exact", "rouge1", "rouge2", "recall", "confirmed")}
        shares = "/".join(f"{share:.2f}" for share in found.values())
        parts.append(
            f"{name} {shares} false={row[f'{name}_false']} {row[f'{name}_status']} {row[f'{name}_seconds']:.0f} s"
        )
    return "  ".join([*parts, row["defence"]])
