"""The command line `dager`: capture an update, attack it, score the result, look inside.

torch and transformers are imported inside the commands, so that help, and mistakes in options, come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dager_tutorial import __version__
from dager_tutorial.cli import bench, challenge, defend, models
from dager_tutorial.cli.audit import audit
from dager_tutorial.cli.baselines import baseline
from dager_tutorial.cli.demo import demo
from dager_tutorial.cli.parties import attack, capture, inspect, recover, score
from dager_tutorial.cli.sweep import sweep
from dager_tutorial.cli.tables import plot, table
from dager_tutorial.errors import DagerError, printable

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Exact gradient inversion for language models: what does an update give away?",
)
for command in (demo, capture, recover, score, attack, baseline, inspect, audit, sweep, table, plot):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(defend.app, name="defend")
app.add_typer(models.app, name="models")
app.add_typer(challenge.app, name="challenge")


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
    except KeyboardInterrupt:  # while another exception was handled
        code = 130
    except Exception as error:
        # A mistake in options says itself in one line. Its class is click's or typer's own: that changed with typer.
        said = getattr(error, "format_message", None)
        if said is None:
            raise
        return _complain(said())
    if code == 130:
        print("dager: stopped", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    """Print a mistake as one line on standard error; a group without a command has shown help."""
    if message:
        print(f"dager: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
