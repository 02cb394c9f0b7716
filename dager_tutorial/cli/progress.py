"""What whoever watches sees while the command line works, and how to stop it: bars on standard error, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dager_tutorial.errors import printable

Advance = Callable[[str, int, int | None], None]
"""Called with a stage, what is done of it, and the total or None."""


def waiting(what: str, console: Console | None = None) -> AbstractContextManager[object]:
    """A spinner while the block runs, where somebody watches.

    Args:
        what: What is being done.
        console: Where to show it; standard error by default.
    """
    console = console or Console(stderr=True)
    return console.status(printable(what)) if console.is_terminal else nullcontext()


@contextmanager
def progress(console: Console | None = None) -> Iterator[Advance]:
    """Bars while the block runs, one a stage; nothing is shown where nobody watches.

    Args:
        console: Where to show them; standard error by default.

    Yields:
        What to call with a stage, what is done of it, and the total or None.
    """
    console = console or Console(stderr=True)
    shown = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    off, here = not console.is_terminal, sys.stdout.isatty()
    # rich would send to the bars' console what is printed meanwhile, which a file or a pipe then did not get.
    with Progress(*shown, console=console, transient=True, disable=off, redirect_stdout=here) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask the block to end with what it has; the second ends the program.

    Yields:
        Whether somebody asked.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
        yield asked.is_set
        return

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before)
        print("dager: stopping with what was found so far; press Ctrl-C again to give up", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
