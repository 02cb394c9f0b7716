"""`dager defend`: every defence against two attackers, and what it costs; rows that are there are not made again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from dager_tutorial.cli import output
from dager_tutorial.cli.defenses import DefenseOptions
from dager_tutorial.cli.options import (
    ClientOptions,
    ModelOptions,
    OutputOptions,
    Seed,
    SeriesOptions,
    TimeBudget,
    flattened,
)
from dager_tutorial.cli.progress import progress
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.evaluation.defending import Cell

UNDEFENDED, CLIENT = DefenseOptions(), ClientOptions()
Rows = Annotated[
    Path, Option("--rows", callback=output.writable, help="JSON lines: read first, then added to, one line a run.")
]

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
    batches = series.draw(seed)
    from dager_tutorial.evaluation.defending import leakage_row, missing
    from dager_tutorial.evaluation.store import append_row, read_rows
    from dager_tutorial.server.budget import AttackConfig

    shared = {"measure": "leakage", **_model(model), **vars(client), "time_budget": time_budget}
    todo = list(missing(batches, _cells(defences), read_rows(rows), shared))
    limits, loaded, made = AttackConfig(time_budget=time_budget), model.load(), []
    with progress() as advance:
        for batch, cell, parameters in todo:
            config = client.config(batch.seed)
            row = leakage_row(loaded, batch, cell, config=config, limits=limits, progress=advance)
            append_row(rows, parameters | row)
            made.append(parameters | row)
            typer.echo(_leak_line(parameters | row))
    results.finish({"rows": str(rows), "made": made}, f"{len(made)} rows made, the others were there")


@app.command()
@flattened
def utility(
    *,
    model: ModelOptions,
    data: Annotated[str, Option("--data", help="Texts by name, or a TSV file.")] = "reviews",
    runs: Annotated[int, Option("--runs", min=1, help="Runs of each defence, seeds counted up.")] = 3,
    updates: Annotated[int, Option("--updates", min=1, help="Updates of a run, which AdamW applies.")] = 150,
    learning_rate: Annotated[float, Option("--learning-rate", min=1e-12, max=10.0, help="Of AdamW.")] = 5e-4,
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
    from dager_tutorial.evaluation.store import append_row, is_there, read_rows
    from dager_tutorial.evaluation.utility import Training, utility_row

    how, examples = Training(updates, learning_rate=learning_rate, tests=tests), load_texts(data)
    shared = {"measure": "utility", **_model(model), "data": Path(data).stem, **vars(how)}
    wanted = [
        (cell, shared | {"seed": each, "defence": cell.name})
        for cell in _cells(defences)
        for each in range(seed, seed + runs)
    ]
    there = read_rows(rows)
    todo = [(cell, parameters) for cell, parameters in wanted if not is_there(there, parameters)]
    loaded, made = model.load(), []
    for cell, parameters in todo:
        row = parameters | utility_row(loaded, examples, cell, parameters["seed"], how)
        append_row(rows, row)
        made.append(row)
        typer.echo(f"seed={row['seed']}  right={row['right']}/{row['tests']}  {row['seconds']:.0f} s  {cell.name}")
    results.finish({"rows": str(rows), "made": made}, f"{len(made)} rows made, the others were there")


@app.command()
@flattened
def table(
    *,
    rows: Annotated[list[Path], Option("--rows", exists=True, dir_okay=False, help="JSON lines; repeat it.")],
    markdown: Annotated[
        Path | None, Option("--markdown", callback=output.writable, help="Write the table as Markdown.")
    ] = None,
    results: OutputOptions,
) -> None:
    """Put rows together: what comes back behind every defence, beside what is learned with it."""
    from dager_tutorial.evaluation.defence_table import markdown_table
    from dager_tutorial.evaluation.store import read_rows

    found = [row for path in rows for row in read_rows(path)]
    written = markdown_table(found)
    if markdown is not None:
        output.write_text(markdown, written)
    results.finish({"rows": found}, written)


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
