"""A store of measurements: one JSON line a row, appended whole, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dager_tutorial.errors import DagerError, quote


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in their order.

    Args:
        path: The file; none is there before the first row.

    Raises:
        DagerError: It cannot be read, or a line of it is no row, as one that was cut off.
    """
    try:
        lines = path.read_text("utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DagerError(f"{quote(path)} cannot be read ({quote(error)}): name a file of rows") from None
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DagerError(f"{quote(path)}, line {number}: is no row: take the line out, or name another file")
    return row


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row behind the others: in one write, so that several runs may share a file.

    Args:
        path: The file.
        row: JSON types by name.

    Raises:
        DagerError: It cannot be written.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:
        raise DagerError(f"{quote(path)} cannot be written ({quote(error)}): name another file") from None


def is_there(rows: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> bool:
    """Whether a row has these parameters.

    Args:
        rows: What was measured.
        parameters: What a run would be of.
    """
    return any(all(row.get(name, ...) == value for name, value in parameters.items()) for row in rows)
