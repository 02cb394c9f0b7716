"""The commands of the sealed envelopes: list them, take one, hand in what was found."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from dager_tutorial import files
from dager_tutorial.cli import display, output
from dager_tutorial.errors import DagerError, printable

if TYPE_CHECKING:
    from dager_tutorial.challenges.grading import Grade
    from dager_tutorial.challenges.registry import Envelope

LARGEST = 4_000_000  # bytes of a submission
LONGEST_CAUSE = 10_000  # characters

Number = Annotated[int, Argument(metavar="N", help="The envelope's number.")]
Set = Annotated[Path | None, Option("--set", help="A folder with another set of envelopes.")]

app = typer.Typer(help="Sealed envelopes: updates to attack whose texts nobody tells you.", no_args_is_help=True)


@app.command(name="list")
def list_envelopes(*, folder: Set = None) -> None:
    """List the envelopes and what is known of each."""
    table = display.headed("", "model", left=["model"], leading=1)
    table.add_column("what is known", ratio=1, overflow="fold")
    for each in _envelopes(folder):
        story = Text.assemble((printable(each.title), "bold"), f"\n{printable(each.story)}")
        table.add_row(str(each.number), printable(str(each.config.get("model_type"))), story)
    output.show(table)


@app.command()
def get(
    *,
    number: Number,
    out: Annotated[
        Path | None, Option("--out", "-o", callback=output.writable, help="The update file to write.")
    ] = None,
    folder: Set = None,
) -> None:
    """Write an envelope's update file, and beside it the folder of its model."""
    envelope = _envelope(number, folder)
    target = files.writable(out or Path(f"{envelope.name}.safetensors"))
    model = _model_folder(target)
    content = envelope.content()
    model.mkdir(exist_ok=True)
    output.write_json(model / "config.json", envelope.config)
    for name, part in envelope.adapter_files().items():
        output.write_bytes(model / name, part)
    output.write_bytes(target, content)
    command = ["dager", "recover", str(target), "--model", f"random:{model}", "--model-seed", str(envelope.seed)]
    command += ["--adapter", str(model)] if envelope.adapter else []
    facts = {"envelope": f"{number}, {envelope.title}", "known": envelope.story, "update": target, "model": model}
    output.show(display.facts(facts))
    print(f"{shlex.join([*command, '--json', f'{target.stem}.json'])}")


@app.command()
def submit(
    *,
    number: Number,
    result: Annotated[Path, Option("--json", help="What dager recover --json wrote; it is read, never written.")],
    cause: Annotated[str, Option("--cause", help="Why texts are missing; or the field cause of the JSON file.")] = "",
    folder: Set = None,
) -> None:
    """Grade what was found: points for texts of the batch, points taken for false certainty."""
    seal = _envelope(number, folder).seal()
    record = _record(result)
    from dager_tutorial.challenges.grading import grade

    found = output.read_result(result)
    points = grade(seal, found, (cause or record.get("cause") or "")[:LONGEST_CAUSE])
    output.show(_grade_table(points))
    print(_verdict(points))


def _envelopes(folder: Path | None) -> tuple[Envelope, ...]:
    """All envelopes of a set, of the shipped one by default."""
    from dager_tutorial.challenges.registry import SHIPPED, envelopes

    return envelopes(folder or SHIPPED)


def _envelope(number: int, folder: Path | None) -> Envelope:
    """One envelope of a set, of the shipped one by default."""
    from dager_tutorial.challenges.registry import SHIPPED, envelope

    return envelope(number, folder or SHIPPED)


def _model_folder(target: Path) -> Path:
    """The folder beside an update file for its model and adapter; one that holds anything else is left alone."""
    from dager_tutorial.challenges.handed_out import FILES

    model, own = target.with_name(f"{target.stem}-model"), {"config.json", *FILES}
    others = [path for path in model.iterdir() if path.name not in own] if model.is_dir() else []
    if others or (model.exists() and not model.is_dir()):
        raise DagerError(f"{model}: is there and not this envelope's model; choose another name with --out")
    return model


def _record(path: Path) -> dict[str, Any]:
    """The submission as it is, of bearable size; `read_result` checks what is in it."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise DagerError(
                f"{path}: is no file of at most {LARGEST // 10**6} MB; give what dager recover --json wrote"
            )
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); give what dager recover --json wrote") from error
    except (DagerError, RecursionError, ValueError) as error:
        reason = error if isinstance(error, DagerError) else f"{path}: is no JSON file ({error}); write it again"
        raise DagerError(str(reason)) from None
    if not isinstance(record, dict) or not isinstance(record.get("cause", ""), str):
        raise DagerError(f"{path}: must be a result of dager recover --json, with a text as cause if any")
    return record


def _grade_table(points: Grade) -> Table:
    """What was counted, and what each is worth."""
    from dager_tutorial.challenges.grading import CAUSE, CLAIMED, FALSE, FULL, GUESSED

    table = display.headed("", "count", "each", left=[""])
    rows = {
        "texts of the batch, claimed": (points.claimed, CLAIMED),
        "texts of the batch, guessed": (points.guessed, GUESSED),
        "false claims": (points.false_claims, FALSE),
        "false guesses": (points.false_guesses, 0),
        "cause written where texts are missing": (int(points.cause and not points.whole), CAUSE),
        "full marks": (int(points.full), FULL),
    }
    for name, (count, each) in rows.items():
        table.add_row(name, str(count), f"{each:+d}" if each else "0")
    return table


def _verdict(points: Grade) -> str:
    """The sum, and what to do next."""
    said = f"{points.points} points" + (", full marks" if points.full else "")
    if points.false_claims:
        return f"{said}: something that you called certain is not in the batch"
    if points.wants_cause:
        return f"{said}: texts are missing; write why, with --cause or as the field cause"
    return f"{said}: the whole batch" if points.whole else said
