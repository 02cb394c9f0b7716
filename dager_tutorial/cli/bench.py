"""The commands that measure how well and how fast the attack does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from dager_tutorial.baselines import PRIOR
from dager_tutorial.cli import display, output
from dager_tutorial.cli.baselines import PRIOR_HELP, EffortOptions, load_prior
from dager_tutorial.cli.options import (
    ClientOptions,
    Markdown,
    ModelOptions,
    OutputOptions,
    Seed,
    SeriesOptions,
    Task,
    TimeBudget,
    drawn,
    flattened,
)
from dager_tutorial.cli.picture import draw_scaling, drawable
from dager_tutorial.cli.progress import progress
from dager_tutorial.errors import DagerError, printable, quote

if TYPE_CHECKING:
    from dager_tutorial.evaluation.ablation import EncoderBenchmark
    from dager_tutorial.evaluation.accuracy import AccuracyRun
    from dager_tutorial.evaluation.scaling import ScalingRun
    from dager_tutorial.evaluation.sensitivity import SensitivityRun

SCALING = (1, 2, 4, 8, 16, 32)  # batch sizes of `bench scaling` where none is given
VARIANTS = ("full", "no incidence", "no relaxation", "no polish", "textbook")  # of `bench encoder`
PRIOR_ATTACKS = ("ours", "textbook", "dlg", "tag", "lamp")  # of `bench priors`
CLIENT = ClientOptions(share="attention")  # of `bench accuracy`

OneSource = Annotated[str, Option("--data", help="Texts by name, or a TSV file.")]

app = typer.Typer(help="Measure how well and how fast the attack does.", no_args_is_help=True)


@app.command()
@flattened
def decoder(
    *,
    model: ModelOptions,
    data: OneSource,
    batch_size: Annotated[int, Option("--batch-size", min=1, help="Number of texts.")] = 4,
    textbook: Annotated[bool, Option(help="Run the slow textbook version too.")] = True,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Time the attack on a causal model and the textbook version on the same update."""
    texts, labels = drawn(data, batch_size, seed)
    language_model = model.load()
    from dager_tutorial.evaluation.bench import bench_decoder

    with progress() as advance:
        record = bench_decoder(language_model, texts, labels, textbook=textbook, progress=advance).to_json()
    results.finish(record, display.facts(record))


@app.command()
@flattened
def scaling(
    *,
    model: ModelOptions,
    data: OneSource,
    batch_size: Annotated[
        list[int] | None,
        Option("--batch-size", min=1, help="Number of texts; repeat it. 1, 2, 4, ... 32 by default."),
    ] = None,
    picture: Annotated[
        Path | None, Option("--picture", callback=drawable, help="Draw seconds against rows (.png, .svg or .pdf).")
    ] = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Time the attack on growing batches, and say how each stage grows with the rows."""
    batches = [drawn(data, size, seed) for size in batch_size or SCALING]
    language_model = model.load()
    from dager_tutorial.evaluation.scaling import bench_scaling, growth

    with progress() as advance:
        runs = list(bench_scaling(language_model, batches, progress=advance))
    powers = growth(runs)
    if picture is not None:
        draw_scaling(picture, runs, powers)
    record = {"model": model.model, "growth": powers, "runs": [run.to_json() for run in runs]}
    results.finish(record, _scaling_table(runs, powers))


@app.command()
@flattened
def accuracy(
    *,
    model: ModelOptions,
    series: SeriesOptions,
    client: ClientOptions = CLIENT,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Attack many batches, of a model of either kind, and count what comes back exactly."""
    batches = series.draw(seed)
    config, language_model = client.config(seed=0), model.load()  # one head for all batches, whatever drew them
    from dager_tutorial.evaluation.accuracy import bench_accuracy

    runs = []
    with progress() as advance:
        for run in bench_accuracy(language_model, batches, config=config, progress=advance):
            runs.append(run.to_json())
            typer.echo(_line(run))
    results.finish({"model": model.model, **vars(client), "runs": runs})


@app.command()
@flattened
def encoder(
    *,
    model: ModelOptions,
    series: SeriesOptions,
    variant: Annotated[
        list[str] | None, Option("--variant", help=f"{', '.join(VARIANTS)}; repeat it. All by default.")
    ] = None,
    cap: Annotated[
        int, Option("--cap", min=1, help="Texts of each length that the textbook version tests at most.")
    ] = 20_000,
    time_budget: Annotated[
        float | None,
        Option("--time-budget", min=0.0, help="Seconds after which a search stops, the textbook's excepted."),
    ] = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Attack encoders with and without each part of the search, and as the paper does."""
    batches = series.draw(seed)
    language_model = model.load()
    from dager_tutorial.evaluation.ablation import bench_encoder

    runs = []
    limits: dict[str, Any] = {"cap": cap, "time_budget": time_budget}
    with progress() as advance:
        for one in bench_encoder(language_model, batches, variants=variant or VARIANTS, progress=advance, **limits):
            runs.append(one)
            typer.echo(f"{_line(one.run)}  {one.variant}")
    record = {"model": model.model, **limits, "runs": [run.to_json() for run in runs]}
    results.finish(record, _variants_table(runs))


@app.command()
@flattened
def sensitivity(
    *,
    markdown: Markdown = None,
    results: OutputOptions,
) -> None:
    """Attack with each of the attack's constants halved and doubled, and count what changes."""
    from dager_tutorial.evaluation.sensitivity import bench_sensitivity, markdown_table

    runs = []
    with progress() as advance:
        for run in bench_sensitivity(progress=advance):
            runs.append(run)
            typer.echo(_change(run))
    if markdown is not None:
        output.write_text(markdown, markdown_table(runs))
    results.finish({"runs": [run.to_json() for run in runs]})


@app.command()
@flattened
def taps(
    *,
    model: ModelOptions,
    series: SeriesOptions,
    task: Task = "classification",
    markdown: Markdown = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Attack a causal model by each kind of gradient alone: embeddings, positions, head, norms, every linear map."""
    batches, language_model = series.draw(seed), model.load()
    from dager_tutorial.evaluation.taps import bench_taps, markdown_table

    runs = []
    with progress() as advance:
        for run in bench_taps(language_model, batches, task=task, progress=advance):
            runs.append(run)
            typer.echo(f"B={run.batch_size}  seed={run.seed}  exact={run.exact:.3f}  {run.status}  {run.shared}")
    if markdown is not None:
        output.write_text(markdown, markdown_table(runs))
    results.finish({"model": model.model, "task": task, "runs": [run.to_json() for run in runs]})


@app.command()
@flattened
def priors(
    *,
    model: ModelOptions,
    series: SeriesOptions,
    attack: Annotated[
        list[str] | None, Option("--attack", help=f"{', '.join(PRIOR_ATTACKS)}; repeat it. All by default.")
    ] = None,
    effort: EffortOptions,
    prior: Annotated[str, Option("--prior", help=PRIOR_HELP)] = PRIOR,
    time_budget: TimeBudget = None,
    markdown: Markdown = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Attack the same updates as was done before, as DAGER's paper writes it, and as this project does."""
    if unknown := sorted({*(attack or ())} - {*PRIOR_ATTACKS}):
        raise DagerError(f"--attack is {quote(unknown[0])}: choose one of {', '.join(PRIOR_ATTACKS)}")
    batches, language_model = series.draw(seed), model.load()
    from dager_tutorial.evaluation.priors import ATTACKS, PriorLimits, bench_priors, markdown_table

    runs, judge = [], load_prior(prior, model.device)
    limits = PriorLimits(effort.effort(), time_budget)
    with progress() as advance:
        told: dict[str, Any] = {"limits": limits, "prior": judge, "attacks": attack or ATTACKS}
        for run in bench_priors(language_model, batches, progress=advance, **told):
            runs.append(run)
            typer.echo(f"{run.data}  B={run.batch_size}  R1={run.rouge1:.3f}  {run.seconds:.1f} s  {run.attack}")
    if markdown is not None:
        output.write_text(markdown, markdown_table(runs))
    record = {"model": model.model, **vars(effort), "time_budget": time_budget}
    results.finish(record | {"runs": [run.to_json() for run in runs]})


def _change(run: SensitivityRun) -> str:
    """One run with a changed constant in one line."""
    what = f"{run.constant} = {run.value:g}" if run.constant else "all constants as they are"
    found = f"exact={run.exact}/{run.texts}  false={run.false}  confirmed and false={run.false_confirmed}"
    return f"{what}  {found}  {run.seconds:.1f} s  {'; '.join(run.changed)}".rstrip()


def _line(run: AccuracyRun) -> str:
    """One batch of a benchmark in one line."""
    parts = (run.data, f"B={run.batch_size}", f"seed={run.seed}", f"rows={run.rows}", f"exact={run.exact:.3f}")
    return "  ".join((*parts, f"false={run.false}", f"R1={run.rouge1:.3f}", run.status, f"{run.seconds:.1f} s"))


def _scaling_table(runs: list[ScalingRun], powers: dict[str, float | None]) -> Table:
    """One row a batch: its size, the attack's seconds by stage, and what came of it; last, the exponents of growth."""
    titles = ("texts", "rows", *runs[0].stage_seconds, "total", "ms/row", "exact %", "status")
    table = display.headed(*titles, left=["status"], collapse_padding=True)
    for run in runs:
        seconds = (f"{duration:.2f}" for duration in (*run.stage_seconds.values(), run.seconds))
        table.add_row(
            str(run.batch_size),
            str(run.rows),
            *seconds,
            f"{1000 * run.seconds / run.rows:.1f}",
            f"{100 * run.exact:.1f}",
            run.status,
        )
    if any(power is not None for power in powers.values()):
        table.add_section()
        shown = ("" if power is None else f"{power:.2f}" for power in powers.values())
        table.add_row("", "rows^", *shown)
    return table


def _variants_table(runs: list[EncoderBenchmark]) -> Table:
    """One row for each variant on batches of one size from one source: means over the batches."""
    from dager_tutorial.evaluation.ablation import averages

    titles = ("data", "texts", "variant", "ROUGE-1 %", "exact %", "false", "seconds")
    table = display.headed(*titles, left=("data", "variant"), collapse_padding=True)
    for row in averages(runs):
        shares = (f"{100 * share:.1f}" for share in (row.rouge1, row.exact))
        name = printable(row.data)
        table.add_row(name, str(row.batch_size), row.variant, *shares, str(row.false), f"{row.seconds:.2f}")
    return table
