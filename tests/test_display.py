"""What people see: every status explained, marks that follow the records, texts that cannot take over a terminal."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dager_tutorial.cli import display
from dager_tutorial.cli.display import CERTAINTIES, COLOURS
from dager_tutorial.cli.progress import progress, waiting
from dager_tutorial.errors import printable
from dager_tutorial.evaluation.metrics import Pair
from dager_tutorial.models.tap import Tap
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.inspection import TapReport
from dager_tutorial.status import Certainty, Confirmation, Status

HOSTILE = "snow \x1b[2J\x1b]0;title\x07 [bold red]and[/] more [/nothing]\nsnow\u202eriver"


def printed(part, width=80):
    """What a terminal of this width shows, without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(part)
    return console.file.getvalue()


def rows_of(table):
    """The rows of a printed table as words."""
    return [line.split() for line in printed(table).splitlines() if line.strip()]


def found(status=Status.PARTIAL, certainties=(), texts=("snow",), diagnosis=""):
    confirmations = tuple(map(Confirmation, certainties))
    sequences = tuple((index,) for index in range(len(texts)))
    return Reconstruction(sequences, tuple(texts), (1.0,) * len(texts), status, confirmations, diagnosis)


def test_every_status_and_certainty_has_a_colour():
    assert set(COLOURS) == {status.value for status in Status}
    assert set(CERTAINTIES) == {certainty.value for certainty in Certainty} | {"-"}


@pytest.mark.parametrize("status", Status)
def test_a_status_is_explained_and_advises_unless_every_text_is_confirmed_to_its_end(status):
    whole, rows, guess = Certainty.WHOLE, Certainty.ROWS, Certainty.GUESS
    for certainties in ((whole, whole), (whole, rows), (whole, guess), ()):
        shown = display.status_lines(found(status, certainties, ("snow", "rain"), "3 of 4 rows [bold]")).plain
        first, diagnosis, *advice = shown.split("\n")
        assert (first, diagnosis) == (f"{status.value}: {status.meaning}", "3 of 4 rows [bold]")
        assert advice == ([] if certainties == (whole, whole) else [f"advice: {status.advice}"])
    nothing = display.status_lines(found(status, texts=())).plain
    assert nothing == f"{status.value}: {status.meaning}\nadvice: {status.advice}"


def test_each_recovered_text_says_by_what_it_is_confirmed():
    marked = display.recovered_table(found(certainties=Certainty, texts=("snow", "rain", "wind")))
    assert [row for row in rows_of(marked) if row[-1] in ("snow", "rain", "wind")] == [
        ["whole", "1.00", "snow"],
        ["rows", "1.00", "rain"],
        ["guess", "1.00", "wind"],
    ]
    legend = " ".join(printed(marked).split())
    assert all(f"{name} = {CERTAINTIES[name][1]}" in legend for name in ("rows", "guess")) and "whole =" not in legend
    sure = printed(display.recovered_table(found(certainties=[Certainty.WHOLE])))
    assert "=" not in sure and "guess" not in sure
    unsaid = rows_of(display.recovered_table(found()))
    assert ["-", "1.00", "snow"] in unsaid


def test_marks_follow_the_tokens_and_not_the_spelling():
    pairs = [Pair("Snow", "snow", True), Pair("two  blanks", "two blanks", True), Pair("ice", "ice", False)]
    rows = rows_of(display.beside_table([*pairs, Pair("wind", "", False)]))
    assert [row for row in rows if row[0] in "✓✗"] == [
        ["✓", "snow", "Snow"],
        ["✓", "two", "blanks", "two", "blanks"],
        ["✗", "ice", "ice"],
        ["✗", "nothing", "wind"],
    ]


def test_ranks_show_the_number_of_inputs_and_what_is_full():
    tap = Tap(3, "MLP", ("w",))
    table = display.ranks_table([TapReport(tap, (7, 64), 5, 1e-7, 1e4, False), TapReport(tap, (7, 9), 9, 0, 1, True)])
    shown = [row[3:] for row in rows_of(table) if row[:3] == ["block", "3", "MLP"]]
    assert shown == [["5", "64", "1.0e-07", "1.0e+04"], ["9", "9", "0.0e+00", "1.0e+00", "saturated"]]


@pytest.mark.parametrize(
    "part",
    [
        display.recovered_table(found(texts=(HOSTILE,))),
        display.beside_table([Pair(HOSTILE, HOSTILE, True)]),
        display.status_lines(found(diagnosis=HOSTILE)),
        display.facts({"model": HOSTILE}),
        display.tensors_table({HOSTILE: (2, 3)}, 1),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_text_cannot_take_over_the_terminal(part):
    shown = printed(part, width=200)
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "[bold red]and[/] more [/nothing]↵snow" in shown
    assert max(cell_len(line) for line in printed(part).splitlines()) <= 80


def test_nothing_that_prints_is_lost_and_nothing_else_is_kept():
    every = "".join(map(chr, range(0x3000)))
    assert printable(every).isprintable()
    assert [sign for sign in every if sign.isprintable()] == [
        sign for sign, shown in zip(every, printable(every), strict=True) if sign == shown
    ]


@pytest.mark.parametrize("watched", [False, True])
def test_progress_is_shown_only_where_somebody_watches(watched):
    console = Console(file=io.StringIO(), force_terminal=watched, width=80)
    with waiting("loading \x1b[2J", console), progress(console) as advance:
        advance("filter \x1b[2J", 0, None)
        advance("filter \x1b[2J", 3, 4)
        advance("search", 1, 2)
    shown = console.file.getvalue()
    assert ("filter" in shown and "3/4" in shown and "search" in shown) if watched else shown == ""
    assert "\x1b[2J" not in shown


def test_what_is_printed_meanwhile_stays_in_the_file_that_it_was_meant_for(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress(console) as advance:
        advance("search", 1, 2)
        print("a line of the result")
    assert capsys.readouterr().out == "a line of the result\n"
    assert "result" not in console.file.getvalue()
