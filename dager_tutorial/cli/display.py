"""What the command line shows: updates, reconstructions and scores as tables for people.

Everything here takes records and returns or prints rich objects; it computes nothing. Texts come from
strangers, so they are printed as plain text: no markup and no terminal control codes take effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable

    from dager_tutorial.reconstruction import Reconstruction

    Progression = Callable[[str, int, int | None], None]

COLOURS = {"exact": "bold green", "partial": "bold yellow", "saturated": "bold yellow"}
STAGES = ("subspace", "filter", "search")
CONTEXT = 2  # rows shown before a long list is cut short


def printable(text: str) -> str:
    """Make a stranger's text safe to print: line breaks become a sign, control codes a replacement character.

    >>> printable("two" + chr(10) + "lines and a bell" + chr(7)) == "two↵lines and a bell�"
    True
    """
    signs = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", " ")
    return "".join(sign if sign.isprintable() else "�" for sign in signs)


def heading(title: str, note: str = "") -> Rule:
    """A titled line, with an optional remark in a quieter colour."""
    text = Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim"))
    return Rule(text, align="left", style="cyan", characters="─")


def facts(rows: Mapping[str, Any]) -> Table:
    """Two columns, names and values."""
    table = _plain_table()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name.replace("_", " ")), Text(plain(value)))
    return table


def plain(value: Any) -> str:
    """A value for people: four digits of a fraction, separators in whole numbers, a dash for None.

    >>> plain(26542080), plain(0.123456), plain(None), plain(True)
    ('26,542,080', '0.1235', '-', 'yes')
    """
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def tensors_table(shapes: Mapping[str, Sequence[int]], shown: int) -> Table:
    """The first tensors of an update by name and shape.

    Args:
        shapes: Tensor name to shape, in the order of the update.
        shown: Number of tensors to list; the others are counted.
    """
    table = _plain_table()
    table.add_column(overflow="fold")
    table.add_column(style="cyan", no_wrap=True)
    for name, shape in list(shapes.items())[:shown]:
        table.add_row(Text(printable(name)), Text(" x ".join(map(str, shape))))
    if len(shapes) > shown:
        table.add_row(Text(f"... and {len(shapes) - shown} more", "dim"), "")
    return table


def ranks_table(rows: Iterable[tuple[str, tuple[int, int], int, float, float, bool]]) -> Table:
    """Numerical ranks: what the update's linear maps say of the number of tokens.

    Args:
        rows: Name of the tap, shape (outputs, inputs), rank, noise floor, gap between the last signal and the
            first noise singular value, and whether the rank reached the number of inputs.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("linear maps", overflow="fold")
    for title in ("rank", "of", "noise floor", "gap"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, (_, inputs), rank, noise, gap, saturated in rows:
        mark = Text("saturated", "yellow") if saturated else Text("")
        table.add_row(Text(name), Text(str(rank), "bold"), str(inputs), f"{noise:.1e}", f"{gap:.1e}", mark)
    return table


def recovered_table(found: Reconstruction) -> Table:
    """The recovered texts, each with its calibrated residual ratio (about 1 when true)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", expand=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("recovered text", ratio=1, overflow="fold")
    for text, ratio in zip(found.texts, found.scores, strict=True):
        table.add_row(f"{ratio:.2f}", Text(printable(text)))
    return table


def beside_table(pairs: Sequence[tuple[str, str]], all_exact: bool) -> Table:
    """Recovered texts beside the true ones, the exact ones marked.

    Args:
        pairs: The true text and the recovered one, "" where nothing was recovered.
        all_exact: Every sequence is known to be exact, however the tokenizer spells it.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", expand=True, show_lines=False)
    table.add_column("", width=1)
    table.add_column("recovered by the server", ratio=1, overflow="fold")
    table.add_column("what the client wrote", ratio=1, overflow="fold", style="dim")
    for index, (true, recovered) in enumerate(pairs):
        exact = all_exact or true == recovered
        mark = Text("✓", "bold green") if exact else Text("✗", "bold red")
        shown = Text(printable(recovered) or "nothing", "green" if exact else "yellow")
        table.add_row(mark, shown, Text(printable(true)), end_section=index + 1 == len(pairs))
        if index + 1 < len(pairs):
            table.add_row("", "", "")
    return table


def status_line(found: Reconstruction) -> Text:
    """The status and its explanation."""
    status = (found.status, COLOURS.get(found.status, "bold red"))
    return Text.assemble(status, ": " if found.diagnosis else "", printable(found.diagnosis))


def times_table(seconds: Mapping[str, float]) -> Table:
    """Where the time went: each stage with a bar of its share."""
    table = _plain_table()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    longest = max([*seconds.values(), 1e-9])
    for stage, duration in seconds.items():
        table.add_row(stage, f"{duration:.2f} s", Text("━" * round(36 * duration / longest), "cyan"))
    return table


def scores_table(score: Mapping[str, float | int]) -> Table:
    """The scores in one row: fractions as percentages."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    names = {"exact": "exact", "token_accuracy": "token accuracy", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"}
    for title in (*names.values(), "ROUGE-L", "texts", "tokens"):
        table.add_column(title, justify="right")
    fractions = [f"{100 * score[name]:.1f} %" for name in (*names, "rougeL")]
    table.add_row(*fractions, str(score["batch_size"]), str(score["n_tokens"]))
    return table


def opening(title: str, text: str) -> Panel:
    """A framed introduction."""
    return Panel(Text(text), title=title, title_align="left", border_style="cyan", padding=(0, 1))


def models_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The models that load by name (fields of `models.zoo.ModelRecord`) and whether they are cached."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for title in ("name", "architecture", "parameters", "width", "blocks", "cached"):
        table.add_column(title, justify="left" if title in ("name", "architecture") else "right", no_wrap=True)
    for record in records:
        parameters = f"{record['parameters'] / 1e6:,.0f} M"
        sizes = (parameters, str(record["width"]), str(record["blocks"]), "yes" if record["cached"] else "no")
        table.add_row(Text(record["name"], "bold"), record["architecture"], *sizes)
    return table


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A spinner while the block runs, where somebody watches."""
    with console.status(printable(what)) if console.is_terminal else nullcontext():
        yield


@contextmanager
def progress(console: Console) -> Iterator[Progression | None]:
    """Progress bars while the block runs, one a stage, gone afterwards; None where nobody watches.

    Args:
        console: The console of standard error.

    Yields:
        A callable (stage, done, total or None), or None if the console is no terminal.
    """
    if not console.is_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def save_svg(console: Console, path: Path, title: str) -> None:
    """Write what a recording console showed as a picture that needs no network (no web fonts).

    Args:
        console: A console made with `record=True`.
        path: The SVG file.
        title: The title of the drawn window.
    """
    picture = console.export_svg(title=title)
    path.write_text(re.sub(r"@font-face\s*\{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


def _plain_table() -> Table:
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
