"""What the command line shows: updates, reconstructions and scores as tables for people.

Everything here takes records and returns rich objects; it computes nothing. Texts come from strangers, so they are
printed as plain text: no markup and no terminal control codes take effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dager_tutorial.errors import printable

if TYPE_CHECKING:
    from dager_tutorial.evaluation.metrics import Pair
    from dager_tutorial.reconstruction import Reconstruction
    from dager_tutorial.server.inspection import TapReport

# By value, not by member: the enumerations come with torch, and help does without.
COLOURS = {
    "certified": "bold green",
    "texts_complete": "bold green",
    "rows_complete": "bold green",
    "ends_confirmed": "bold green",
    "partial": "bold yellow",
    "saturated": "bold yellow",
    "out_of_time": "bold yellow",
    "noise": "bold red",
    "below_rounding": "bold red",
    "no_signal": "bold red",
    "wrong_model": "bold red",
}
CERTAINTIES = {  # by what a text is confirmed: the colour, and what it means
    "whole": ("green", "every row and the end of the text"),
    "rows": ("yellow", "every row, but not where the text ends"),
    "guess": ("red", "nothing: the likeliest answer"),
    "-": ("dim", "not said"),
}
STAGES = ("subspace", "filter", "search", "completion")


def plain(value: Any) -> str:
    """A value for people: four digits of a fraction, separators in whole numbers, a dash for None.

    Args:
        value: A number, a truth value, None, or anything that `str` takes.

    Example:
        >>> plain(26542080), plain(0.123456), plain(None), plain(True)
        ('26,542,080', '0.1235', '-', 'yes')
    """
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def heading(title: str, note: str = "") -> Rule:
    """A titled line, with an optional remark in a quieter colour."""
    text = Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim"))
    return Rule(text, align="left", style="cyan", characters="─")


def opening(title: str, text: str) -> Panel:
    """A framed introduction."""
    return Panel(Text(text), title=title, title_align="left", border_style="cyan", padding=(0, 1))


def headed(*titles: str, left: Iterable[str] = (), **options: Any) -> Table:
    """An empty table under these titles.

    Args:
        titles: One a column, none of them wrapped.
        left: Titles of the columns that hold words; the others hold numbers and end at the right.
        options: Further options of the table.
    """
    words = set(left)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", **options)
    for title in titles:
        table.add_column(title, justify="left" if title in words else "right", no_wrap=True)
    return table


def facts(rows: Mapping[str, Any]) -> Table:
    """Two columns, names and values."""
    table = _headless()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name.replace("_", " ")), Text(plain(value)))
    return table


def tensors_table(shapes: Mapping[str, Sequence[int]], shown: int) -> Table:
    """The first tensors of an update by name and shape.

    Args:
        shapes: Tensor name to shape, in the order of the update.
        shown: Number of tensors to list; the others are counted.
    """
    table = _headless()
    table.add_column(overflow="fold")
    table.add_column(style="cyan", no_wrap=True)
    for name, shape in list(shapes.items())[:shown]:
        table.add_row(Text(printable(name)), Text(" x ".join(map(str, shape))))
    if len(shapes) > shown:
        table.add_row(Text(f"... and {len(shapes) - shown} more", "dim"), "")
    return table


def ranks_table(rows: Iterable[TapReport]) -> Table:
    """Numerical ranks: what the update's linear maps say of the number of tokens.

    Args:
        rows: The taps of an inspection.
    """
    table = headed("linear maps", "rank", "of", "noise floor", "gap", "", left=("linear maps", ""))
    for row in rows:
        mark = Text("saturated", "yellow") if row.saturated else Text("")
        sizes = (Text(str(row.rank), "bold"), str(row.shape[1]), f"{row.noise_floor:.1e}", f"{row.gap:.1e}")
        table.add_row(Text(row.tap.name), *sizes, mark)
    return table


def status_lines(found: Reconstruction) -> Text:
    """The status and its meaning, the diagnosis, and advice unless every text is confirmed to its end."""
    status, colour = found.status, COLOURS[found.status]
    lines = [Text.assemble((status.value, colour), f": {status.meaning}")]
    lines += [Text(printable(found.diagnosis))] if found.diagnosis else []
    certainties = {confirmation.certainty.value for confirmation in found.confirmations}
    lines += [] if certainties == {"whole"} else [Text(f"advice: {status.advice}", "dim")]
    return Text("\n").join(lines)


def recovered_table(found: Reconstruction) -> Table:
    """The recovered texts: by what each is confirmed, and its calibrated residual ratio (about 1 when true)."""
    certainties = [confirmation.certainty.value for confirmation in found.confirmations] or ["-"] * len(found.texts)
    legend = [f"{name} = {CERTAINTIES[name][1]}" for name in CERTAINTIES if name in certainties and name != "whole"]
    more = _labels_and_copies(found)
    table = headed("confirmed", "ratio", *more, left=["confirmed"], expand=True, caption_justify="left")
    table.caption = f"confirmed: {'; '.join(legend)}" if legend else None
    table.add_column("recovered text", ratio=1, overflow="fold")
    for place, (certainty, text) in enumerate(zip(certainties, found.texts, strict=True)):
        said = (column[place] for column in more.values())
        mark = Text(certainty, CERTAINTIES[certainty][0])
        table.add_row(mark, f"{found.scores[place]:.2f}", *said, Text(printable(text)))
    return table


def _labels_and_copies(found: Reconstruction) -> dict[str, list[str]]:
    """The columns that completion adds: labels where any is known, copies where any text has several."""
    columns = {}
    if any(found.labels):
        columns["label"] = [classes_of(labels) for labels in found.labels]
    if any((number or 1) > 1 for number in found.copies):
        columns["copies"] = [plain(number) for number in found.copies]
    return columns


def classes_of(labels: Sequence[int]) -> str:
    """The labels of one text for people: each once, a dash for none.

    Args:
        labels: One a copy.

    Example:
        >>> classes_of((1, 1)), classes_of((0, 1)), classes_of(())
        ('1', '0, 1', '-')
    """
    return ", ".join(map(str, sorted(set(labels)))) or "-"


def beside_table(pairs: Sequence[Pair]) -> Table:
    """Recovered texts beside the true ones, the exact ones marked.

    Args:
        pairs: The true text, the recovered one ("" where nothing was recovered), whether they are the same tokens,
            however the tokenizer spells them, and the labels that were recovered with it.
    """
    labelled = any(pair.labels for pair in pairs)
    table = headed("", *(["label"] if labelled else []), left=["", "label"], expand=True, leading=1)
    table.add_column("recovered by the server", ratio=1, overflow="fold")
    table.add_column("what the client wrote", ratio=1, overflow="fold", style="dim")
    for pair in pairs:
        mark = Text("✓", "bold green") if pair.exact else Text("✗", "bold red")
        shown = Text(printable(pair.recovered) or "nothing", "green" if pair.exact else "yellow")
        label = [Text(classes_of(pair.labels))] if labelled else []
        table.add_row(mark, *label, shown, Text(printable(pair.text)))
    return table


def scores_table(score: Mapping[str, float | int]) -> Table:
    """The scores in one row: fractions as percentages."""
    names = {"exact": "exact", "token_accuracy": "token accuracy", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"}
    table = headed(*names.values(), "ROUGE-L", "texts", "tokens")
    fractions = [f"{100 * score[name]:.1f} %" for name in (*names, "rougeL")]
    table.add_row(*fractions, str(score["batch_size"]), str(score["n_tokens"]))
    return table


def times_table(seconds: Mapping[str, float]) -> Table:
    """Where the time went: each stage with a bar of its share."""
    table = _headless()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    longest = max([*seconds.values(), 1e-9])
    for stage, duration in seconds.items():
        table.add_row(stage, f"{duration:.2f} s", Text("━" * round(36 * duration / longest), "cyan"))
    return table


def _headless() -> Table:
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
