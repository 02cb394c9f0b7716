"""The command line `dager`: capture an update, attack it, score the result, look inside.

Commands of the server's side (`recover`, `inspect`) read an update file and a model, never a batch. torch
and transformers are imported inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from dager_tutorial.cli import display
from dager_tutorial import __version__
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.evaluation.bench import AccuracyRun, Batch
    from dager_tutorial.evaluation.ablation import EncoderBenchmark
    from dager_tutorial.evaluation.metrics import Score
    from dager_tutorial.models.language_model import LanguageModel
    from dager_tutorial.reconstruction import Reconstruction
    from dager_tutorial.update import Update

BATCH_SIZE = 8  # texts drawn from --data where --batch-size is not given
SCALING = (1, 2, 4, 8, 16, 32)  # batch sizes of `bench scaling` where none is given
VARIANTS = ("full", "no incidence", "no relaxation", "no polish", "textbook")  # of `bench encoder`


def _writable(path: Path | None) -> Path | None:
    """Refuse an output file that cannot be written, before any work is done for it."""
    if path is None:
        return None
    if path.is_dir():
        raise DagerError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise DagerError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DagerError(f"{path}: may not be written; choose another place")
    return path


Model = Annotated[
    str, typer.Option("--model", "-m", help="Zoo name, Hugging Face id, local folder or random:<config>.")
]
Device = Annotated[Literal["cpu", "cuda", "mps"], typer.Option("--device", help="Where to compute.")]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of everything drawn: the batch, the head, the masks, the search.")
]
ModelSeed = Annotated[int, typer.Option("--model-seed", help="Seed of the weights of a random: model.")]
Blocks = Annotated[int | None, typer.Option("--blocks", min=1, help="Keep only the model's first blocks.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores by default.")]
Json = Annotated[Path | None, typer.Option("--json", callback=_writable, help="Write the result as JSON.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Texts: reviews, grammar, notes, passages, cola, ... or a TSV file."),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help=f"Texts drawn from --data, {BATCH_SIZE} by default.")
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text of the batch; repeat for more.")]
Labels = Annotated[list[int] | None, typer.Option("--label", help="Class of each --text, in order; 0, 1, 0, ...")]
Task = Annotated[
    Literal["classification", "next_token", "masked"],
    typer.Option("--task", help="What the client trains: next_token needs a causal model, masked a bidirectional one."),
]
Loss = Annotated[Literal["cross_entropy", "frobenius"], typer.Option("--loss", help="The client's loss.")]
Dtype = Annotated[
    Literal["float32", "float64", "bfloat16", "float16"],
    typer.Option("--dtype", help="The client's precision."),
]
Share = Annotated[
    str, typer.Option("--share", help="Gradients sent: all, attention, or parameter names joined by commas.")
]
PaddingSide = Annotated[Literal["right", "left"], typer.Option("--padding-side", help="Where the client pads.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Truncate texts to so many tokens.")]
TimeBudget = Annotated[
    float | None, typer.Option("--time-budget", min=0.0, help="Seconds after which the search stops.")
]
BenchData = Annotated[list[str], typer.Option("--data", help="Texts by name, or a TSV file; repeat it.")]
BenchSizes = Annotated[list[int], typer.Option("--batch-size", min=1, help="Number of texts; repeat it.")]
BenchBatches = Annotated[int, typer.Option("--batches", min=1, help="Batches of each kind, seeds counted up.")]
UpdateFile = Annotated[Path, typer.Argument(metavar="UPDATE", help="A safetensors file of named gradients.")]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Exact gradient inversion for language models: what does an update give away?",
)
bench = typer.Typer(help="Measure how well and how fast the attack does.", no_args_is_help=True)
models = typer.Typer()
app.add_typer(bench, name="bench")
app.add_typer(models, name="models")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and turn every mistake of its user into one line.

    Args:
        arguments: What follows `dager`; the process's arguments by default.

    Returns:
        The exit code: 0 whatever the update gives away, 2 after a mistake, 130 after an interrupt.
    """
    try:
        code = app(args=arguments, prog_name="dager", standalone_mode=False)
    except DagerError as error:
        return _complain(str(error))
    except typer.TyperException as error:
        return _complain(error.format_message())
    except KeyboardInterrupt:  # while another exception was handled
        code = 130
    if code == 130:
        print("dager: stopped", file=sys.stderr)
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Print the version or the help where no command is given."""
    if version:
        print(f"dager {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    model: Model = "smollm2-135m",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=60, help="Number of private notes.")] = 8,
    svg: Annotated[
        Path | None, typer.Option("--svg", callback=_writable, help="Save what is shown as a picture.")
    ] = None,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Watch a real language model's gradient give up private notes."""
    from dager_tutorial.cli.demo import run_demo

    console = Console(record=svg is not None, highlight=False)
    language_model = _open(model, device, model_seed, blocks, threads)
    record = run_demo(console, language_model, batch_size, seed)
    _finish(json_file, record)
    if svg is not None:
        display.save_svg(console, svg, "dager demo")


@app.command()
def capture(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", callback=_writable, help="The safetensors file to write.")],
    data: Data = None,
    batch_size: BatchSize = None,
    text: Texts = None,
    label: Labels = None,
    task: Task = "classification",
    loss: Loss = "cross_entropy",
    dtype: Dtype = "float32",
    share: Share = "all",
    padding_side: PaddingSide = "right",
    max_length: MaxLength = None,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Play the client: compute the update of a private batch and write it as safetensors."""
    texts, labels = _batch(data, batch_size, seed, text, label)
    language_model = _open(model, device, model_seed, blocks, threads)
    update = _client(
        language_model, texts, labels, task=task, loss=loss, dtype=dtype, share=share,
        padding_side=padding_side, max_length=max_length, seed=seed,
    )  # fmt: skip
    update.save(out)
    record = {"update": str(out), "model": model, "kind": update.kind, "tensors": len(update.gradients),
              "numbers": _size(update), "batch_size": len(texts)}  # fmt: skip
    _finish(json_file, record, display.facts(record))


@app.command()
def recover(
    update: UpdateFile,
    model: Model,
    json_file: Json = None,
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Play the server: recover the batch from an update file and the model, and from nothing else."""
    loaded = _load(update)
    found = _attack(_open(model, device, model_seed, blocks, threads), loaded, seed, time_budget)
    _finish(json_file, found.to_json(), *_shown(found))


@app.command()
def score(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="What `dager recover --json` wrote.")],
    model: Model,
    data: Data = None,
    batch_size: BatchSize = None,
    text: Texts = None,
    task: Task = "classification",
    max_length: MaxLength = None,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Compare what `dager recover` found with the true batch, given or drawn as for `dager capture`."""
    found = _read_result(result)
    texts, _ = _batch(data, batch_size, seed, text, None)
    language_model = _open(model, device, model_seed, blocks, threads)
    points = _score(found, texts, language_model, task=task, max_length=max_length, seed=seed)
    _finish(json_file, points.to_json(), *_compared(points))


@app.command()
def attack(
    model: Model,
    data: Data = None,
    batch_size: BatchSize = None,
    text: Texts = None,
    label: Labels = None,
    task: Task = "classification",
    loss: Loss = "cross_entropy",
    dtype: Dtype = "float32",
    share: Share = "all",
    padding_side: PaddingSide = "right",
    max_length: MaxLength = None,
    time_budget: TimeBudget = None,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Capture, recover and score in one go: how much would this batch give away?"""
    texts, labels = _batch(data, batch_size, seed, text, label)
    language_model = _open(model, device, model_seed, blocks, threads)
    update = _client(
        language_model, texts, labels, task=task, loss=loss, dtype=dtype, share=share,
        padding_side=padding_side, max_length=max_length, seed=seed,
    )  # fmt: skip
    found = _attack(language_model, update, seed, time_budget)
    points = _score(found, texts, language_model, task=task, max_length=max_length, seed=seed)
    shown = (display.status_line(found), *_compared(points), display.times_table(found.seconds))
    _finish(json_file, found.to_json() | points.to_json(), *shown)


@app.command()
def inspect(
    update: UpdateFile,
    model: Model,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Show an update's ranks, noise floors and what can be expected of an attack."""
    loaded = _load(update)
    language_model = _open(model, device, model_seed, blocks, threads)
    from dager_tutorial.server.evidence import inspect_update

    inspection = inspect_update(language_model, loaded)
    about = display.facts({"update": update, "kind": loaded.kind, "tensors": len(loaded.gradients)})
    _finish(json_file, inspection.to_json(), about, display.ranks_table(inspection.rows), inspection.verdict)


@bench.command()
def decoder(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Texts by name, or a TSV file.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Number of texts.")] = 4,
    textbook: Annotated[bool, typer.Option(help="Run the slow textbook version too.")] = True,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Time the attack on a causal model and the textbook version on the same update."""
    texts, labels = _batch(data, batch_size, seed, None, None)
    language_model = _open(model, device, model_seed, blocks, threads)
    from dager_tutorial.evaluation.bench import bench_decoder

    with display.progress(Console(stderr=True)) as advance:
        record = bench_decoder(language_model, texts, labels, textbook=textbook, progress=advance).to_json()
    _finish(json_file, record, display.facts(record))


@bench.command()
def scaling(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Texts by name, or a TSV file.")],
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="Number of texts; repeat it. 1, 2, 4, ... 32 by default."),
    ] = None,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Time the attack on a causal model on growing batches."""
    batches = [_batch(data, size, seed, None, None) for size in batch_size or SCALING]
    language_model = _open(model, device, model_seed, blocks, threads)
    from dager_tutorial.evaluation.bench import bench_scaling

    with display.progress(Console(stderr=True)) as advance:
        runs = [run.to_json() for run in bench_scaling(language_model, batches, progress=advance)]
    _finish(json_file, {"model": model, "runs": runs}, _scaling_table(runs))


@bench.command()
def accuracy(
    model: Model,
    data: BenchData,
    batch_size: BenchSizes,
    batches: BenchBatches = 5,
    task: Task = "classification",
    dtype: Dtype = "float32",
    share: Annotated[str, typer.Option("--share", help="all or attention.")] = "attention",
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Attack many batches, of a model of either kind, and count what comes back exactly."""
    drawn = _series(data, batch_size, batches, seed)
    language_model = _open(model, device, model_seed, blocks, threads)
    from dager_tutorial.evaluation.bench import bench_accuracy

    runs = []
    with display.progress(Console(stderr=True)) as advance:
        for run in bench_accuracy(language_model, drawn, task=task, dtype=dtype, share=share, progress=advance):
            runs.append(run.to_json())
            typer.echo(_line(run))
    _finish(json_file, {"model": model, "task": task, "dtype": dtype, "runs": runs})


@bench.command()
def encoder(
    model: Model,
    data: BenchData,
    batch_size: BenchSizes,
    batches: BenchBatches = 5,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help=f"{', '.join(VARIANTS)}; repeat it. All by default."),
    ] = None,
    cap: Annotated[
        int, typer.Option("--cap", min=1, help="Texts of each length that the textbook version tests at most.")
    ] = 20_000,
    time_budget: Annotated[
        float | None,
        typer.Option("--time-budget", min=0.0, help="Seconds after which a search stops, the textbook's excepted."),
    ] = None,
    json_file: Json = None,
    seed: Seed = 0,
    model_seed: ModelSeed = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    threads: Threads = None,
) -> None:
    """Attack encoders with and without each part of the search, and as the paper does."""
    drawn = _series(data, batch_size, batches, seed)
    language_model = _open(model, device, model_seed, blocks, threads)
    from dager_tutorial.evaluation.ablation import bench_encoder

    runs = []
    with display.progress(Console(stderr=True)) as advance:
        for run in bench_encoder(
            language_model, drawn, variants=variant or VARIANTS, cap=cap, time_budget=time_budget, progress=advance
        ):
            runs.append(run)
            typer.echo(f"{_line(run)}  {run.variant}")
    record = {"model": model, "cap": cap, "time_budget": time_budget, "runs": [run.to_json() for run in runs]}
    _finish(json_file, record, _variants_table(runs))


@models.callback(invoke_without_command=True)
def list_models(context: typer.Context, json_file: Json = None) -> None:
    """List the models that come by name, fetch some for later, or export one as a Hugging Face folder."""
    if context.invoked_subcommand is None:
        from dager_tutorial.zoo.names import available_models

        records = [vars(record) for record in available_models()]
        _finish(json_file, {"models": records}, display.models_table(records))


@models.command()
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models, as for --model.")],
    json_file: Json = None,
) -> None:
    """Fetch models into the cache (DAGER_CACHE, or ~/.cache/dager-tutorial), so that they load without a network."""
    from dager_tutorial.zoo.cache import cache_folder
    from dager_tutorial.zoo.names import load_model

    for name in names:
        load_model(name, blocks=1)
    _finish(json_file, {"models": names, "cache": str(cache_folder())}, display.facts({"fetched": ", ".join(names)}))


@models.command()
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model, as for --model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is empty or does not exist yet.")],
    json_file: Json = None,
    seed: Annotated[int, typer.Option("--seed", "--model-seed", help="Seed of the weights of a random: model.")] = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
) -> None:
    """Write a model as a normal Hugging Face folder: configuration, weights and tokenizer."""
    from dager_tutorial.zoo.names import export_model

    written = export_model(name, folder, device=device, seed=seed, blocks=blocks)
    _finish(json_file, {"model": name, "folder": str(written)}, display.facts({"model": name, "folder": written}))


def _open(name: str, device: str, seed: int, blocks: int | None, threads: int | None) -> LanguageModel:
    """Load a model. The first time this takes a while, and whoever watches is told so."""
    with display.waiting(Console(stderr=True), f"loading {name}; the first time it is fetched and converted"):
        import torch

        from dager_tutorial.zoo.names import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        return load_model(name, device=device, seed=seed, blocks=blocks)


def _batch(
    data: str | None, size: int | None, seed: int, texts: list[str] | None, labels: list[int] | None
) -> tuple[list[str], list[int] | None]:
    """The private batch, from --text or drawn from --data."""
    if bool(data) == bool(texts):
        raise DagerError("give the texts either with --data NAME or FILE, or with --text (repeat it for more)")
    if texts and size is not None:
        raise DagerError("--batch-size draws from --data; with --text the batch is what you give")
    if texts:
        return texts, labels
    if labels:
        raise DagerError("--label belongs to --text; the texts of --data have labels of their own")
    from dager_tutorial.data import load_texts, sample_batch

    return sample_batch(load_texts(str(data)), BATCH_SIZE if size is None else size, seed)


def _series(data: list[str], sizes: list[int], batches: int, seed: int) -> list[Batch]:
    """Batches of every source and size, drawn with the seeds from `seed` on."""
    return [
        (Path(name).stem, draw, *_batch(name, size, draw, None, None))
        for name in data
        for size in sizes
        for draw in range(seed, seed + batches)
    ]


def _line(run: AccuracyRun) -> str:
    """One batch of a benchmark in one line."""
    parts = (run.data, f"B={run.batch_size}", f"seed={run.seed}", f"rows={run.rows}", f"exact={run.exact:.3f}",
             f"false={run.false}", f"R1={run.rouge1:.3f}", run.status, f"{run.seconds:.1f} s")  # fmt: skip
    return "  ".join(parts)


def _load(path: Path) -> Update:
    from dager_tutorial.update import Update

    return Update.load(path)


def _client(model: LanguageModel, texts: list[str], labels: list[int] | None, *, share: str, **options: Any) -> Update:
    """Compute the client's update; `share` is all, attention, or names joined by commas."""
    from dager_tutorial.client.step import client_update

    shared = share if share in ("all", "attention") else [name.strip() for name in share.split(",")]
    with display.waiting(Console(stderr=True), "computing the client's update"):
        return client_update(model, texts, labels, share=shared, **options)


def _attack(model: LanguageModel, update: Update, seed: int, time_budget: float | None) -> Reconstruction:
    """Recover the batch from the update, with a progress bar where somebody watches."""
    from dager_tutorial.server.attack import AttackConfig, attack

    config = AttackConfig(seed=seed, time_budget=time_budget)
    with display.progress(Console(stderr=True)) as advance:
        return attack(model, update, config=config, progress=advance)


def _score(found: Reconstruction, texts: list[str], model: LanguageModel, **options: Any) -> Score:
    from dager_tutorial.evaluation.metrics import score

    return score(found, texts, model, **options)


def _read_result(path: Path) -> Reconstruction:
    """Read what `dager recover --json` wrote."""
    from dager_tutorial.reconstruction import Reconstruction

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Reconstruction(
            sequences=tuple(tuple(int(token) for token in sequence) for sequence in record["sequences"]),
            texts=tuple(str(text) for text in record["texts"]),
            scores=tuple(math.nan if ratio is None else float(ratio) for ratio in record["scores"]),
            status=record["status"],
        )
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); give what dager recover --json wrote") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DagerError(f"{path}: is no result of dager recover --json ({error!r}); write it again") from error


def _scaling_table(runs: list[dict[str, Any]]) -> Table:
    """One row a batch: its size, the attack's seconds by stage, and what came of it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    titles = ("texts", "tokens", "prefixes", *display.STAGES, "seconds", "exact %")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for run in runs:
        sizes = (str(run[name]) for name in ("batch_size", "n_tokens", "distinct_prefixes"))
        stages = (run["fast_stage_seconds"].get(stage, 0.0) for stage in display.STAGES)
        seconds = (f"{duration:.2f}" for duration in (*stages, run["fast_seconds"]))
        table.add_row(*sizes, *seconds, f"{100 * run['exact']:.1f}", run["status"])
    return table


def _variants_table(runs: list[EncoderBenchmark]) -> Table:
    """One row for each variant on batches of one size from one source: means over the batches."""
    from dager_tutorial.evaluation.ablation import averages

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    for title in ("data", "texts", "variant", "ROUGE-1 %", "exact %", "false", "seconds"):
        table.add_column(title, justify="left" if title in ("data", "variant") else "right", no_wrap=True)
    for row in averages(runs):
        shares = (f"{100 * share:.1f}" for share in (row.rouge1, row.exact))
        table.add_row(
            display.printable(row.data), str(row.batch_size), row.variant, *shares, str(row.false), f"{row.seconds:.2f}"
        )
    return table


def _shown(found: Reconstruction) -> tuple[RenderableType, ...]:
    table = display.recovered_table(found) if found.sequences else "nothing was recovered"
    return display.status_line(found), table, display.times_table(found.seconds)


def _compared(points: Score) -> tuple[RenderableType, ...]:
    return display.beside_table(points.pairs, points.exact == 1), display.scores_table(points.to_json())


def _size(update: Update) -> int:
    return sum(tensor.numel() for tensor in update.gradients.values())


def _finish(json_file: Path | None, record: dict[str, Any], *shown: RenderableType) -> None:
    """Write the record where --json says, one key a line, then print what people read."""
    if json_file is not None:
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
        try:
            json_file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        except OSError as error:
            raise DagerError(f"{json_file}: cannot be written ({error.strerror}); choose another place") from error
    console = Console(highlight=False)
    for part in shown:
        console.print(part)


def _complain(message: str) -> int:
    """Print a mistake as one line on standard error; a group without a command has shown help."""
    if message:
        print(f"dager: error: {display.printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
