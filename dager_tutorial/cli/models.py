"""The commands that list, fetch and export models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from dager_tutorial.cli import display
from dager_tutorial.cli.options import Blocks, Device, OutputOptions, flattened

if TYPE_CHECKING:
    from dager_tutorial.zoo.names import ModelRecord

app = typer.Typer()


@app.callback(invoke_without_command=True)
@flattened
def list_models(*, context: typer.Context, results: OutputOptions) -> None:
    """List the models that come by name, fetch some for later, or export one as a Hugging Face folder."""
    if context.invoked_subcommand is None:
        from dager_tutorial.zoo.names import available_models

        records = available_models()
        results.finish({"models": [vars(record) for record in records]}, _table(records))


@app.command()
@flattened
def fetch(
    *,
    names: Annotated[list[str], Argument(metavar="NAME...", help="Models, as for --model.")],
    results: OutputOptions,
) -> None:
    """Fetch models into the cache (DAGER_CACHE, or ~/.cache/dager-tutorial), so that they load without a network."""
    from dager_tutorial.zoo.cache import cache_folder
    from dager_tutorial.zoo.names import load_model

    for name in names:
        load_model(name, blocks=1)
    results.finish({"models": names, "cache": str(cache_folder())}, display.facts({"fetched": ", ".join(names)}))


@app.command()
@flattened
def export(
    *,
    name: Annotated[str, Argument(metavar="NAME", help="A model, as for --model.")],
    folder: Annotated[Path, Argument(metavar="DIR", help="A folder that is empty or does not exist yet.")],
    seed: Annotated[int, Option("--seed", "--model-seed", help="Seed of the weights of a random: model.")] = 0,
    device: Device = "cpu",
    blocks: Blocks = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Option("--weights", help="What the weights are rounded to.")
    ] = "float32",
    results: OutputOptions,
) -> None:
    """Write a model as a normal Hugging Face folder: configuration, weights and tokenizer."""
    from dager_tutorial.zoo.names import export_model

    written = export_model(name, folder, device=device, seed=seed, blocks=blocks, dtype=dtype)
    results.finish({"model": name, "folder": str(written)}, display.facts({"model": name, "folder": written}))


def _table(records: Sequence[ModelRecord]) -> Table:
    """The models that load by name, what their weights take in memory, and whether they are cached."""
    titles = ("name", "weights", "blocks", "whole", "streamed", "cached")
    table = display.headed(*titles, left=titles[:1])
    for record in records:
        sizes = (f"{record.parameters / 1e6:,.0f} M", f"{record.blocks}×{record.width}")
        memory = (f"{record.whole / 1e9:.1f}G", f"{record.streamed / 1e9:.1f}G")
        table.add_row(Text(record.name, "bold"), *sizes, *memory, "yes" if record.cached else "no")
    return table
