"""Files that commands write and read."""

from __future__ import annotations

import json
import math
import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from dager_tutorial import files
from dager_tutorial.errors import DagerError, quote

if TYPE_CHECKING:
    from dager_tutorial.reconstruction import Reconstruction
    from dager_tutorial.status import Confirmation, Status


def writable(path: Path | None) -> Path | None:
    """The callback of an output's option: refuses what cannot be written before any work is done for it.

    Args:
        path: What the user named, or None.

    Raises:
        DagerError: See `files.writable`.
    """
    return None if path is None else files.writable(path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, one key a line.

    Args:
        path: The file.
        record: JSON types only.

    Raises:
        DagerError: The file cannot be written.
    """
    lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def write_svg(path: Path, console: Console, title: str) -> None:
    """Write what a recording console showed as a picture that needs no network (no web fonts).

    Args:
        path: The SVG file.
        console: A console made with `record=True`.
        title: The title of the drawn window.

    Raises:
        DagerError: The file cannot be written.
    """
    write_text(path, re.sub(r"@font-face\s*\{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL))


def write_text(path: Path, text: str) -> None:
    r"""Write a text as UTF-8. An older file of that name is replaced only when all is written.

    Args:
        path: The file.
        text: Its content. Halves of surrogate pairs, as in names of files that are no UTF-8, are written as `\udcff`,
            which is JSON for them.

    Raises:
        DagerError: The file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes. An older file of that name is replaced only when all is written.

    Args:
        path: The file.
        content: Its content.

    Raises:
        DagerError: The file cannot be written.
    """
    try:
        with files.replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise DagerError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def show(*parts: RenderableType) -> None:
    """Print what people read.

    Args:
        parts: One below the other.
    """
    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def read_result(path: Path) -> Reconstruction:
    """Read what `dager recover --json` wrote; confirmations may be missing.

    Args:
        path: The JSON file.

    Raises:
        DagerError: The file cannot be read, or is no such result.
    """
    try:
        return _reconstruction(json.loads(path.read_text(encoding="utf-8")))
    except DagerError as error:
        raise DagerError(f"{path}: {error}") from None
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); give what dager recover --json wrote") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DagerError(f"{path}: is no result of dager recover --json ({error!r}); write it again") from error


def _reconstruction(record: Any) -> Reconstruction:
    """The record of a result; anything that is not as it should be raises."""
    from dager_tutorial.reconstruction import Reconstruction

    return Reconstruction(
        sequences=tuple(tuple(map(operator.index, sequence)) for sequence in record["sequences"]),
        texts=tuple(str(text) for text in record["texts"]),
        scores=tuple(math.nan if ratio is None else float(ratio) for ratio in record["scores"]),
        status=_status(record["status"]),
        confirmations=tuple(map(_confirmation, record.get("confirmations", ()))),
        labels=tuple(tuple(map(operator.index, labels)) for labels in record.get("labels", ())),
        copies=tuple(None if number is None else operator.index(number) for number in record.get("copies", ())),
        with_targets=bool(record.get("with_targets", False)),
    )


def _status(name: Any) -> Status:
    """The status of a name."""
    from dager_tutorial.status import Status

    known = {status.value: status for status in Status}
    if name not in known:
        reason = f"its status {quote(name)} is unknown (known: {', '.join(known)})"
        raise DagerError(f"{reason}; run dager recover --json again")
    return known[name]


def _confirmation(record: Any) -> Confirmation:
    """How much of a text is confirmed. By which taps is for people to read: names alone make no taps."""
    from dager_tutorial.status import Certainty, Confirmation

    return Confirmation(Certainty(record["certainty"]))
