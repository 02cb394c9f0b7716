"""Rows on disk: one JSON line a cell, each written through to the disk before the next, and healed after a kill.

One sweep at a time owns a folder. Whatever moment it is killed at, at most the line that was being written is torn;
the next sweep sets it aside and computes its cell again.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from dager_tutorial import files
from dager_tutorial.errors import DagerError

ROWS = "rows.jsonl"
DAMAGED = "rows.damaged"

Row = dict[str, Any]


class Store:
    """A folder of rows, owned while the block runs.

    Attributes:
        folder: Where the rows are.
        rows: By key, the latest of each, in the order of their lines.
        damaged: Number of lines that were no rows and have been set aside.

    Raises:
        DagerError: The folder cannot be written, or another sweep owns it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Store(folder) as store:
        ...         store.append({"key": "a", "exact": 1.0})
        ...     read_rows(folder)
        [{'key': 'a', 'exact': 1.0}]
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.rows: dict[str, Row] = {}
        self.damaged = 0
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        self._file: int | None = None

    def __enter__(self) -> Store:
        """Own the folder, read its rows, and set aside what is torn."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        except Timeout:
            raise DagerError(
                f"{self.folder}: another sweep writes its rows here: wait, or name another folder"
            ) from None
        except OSError as error:
            raise DagerError(
                f"{self.folder}: rows cannot be written ({error.strerror}): name another folder"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the folder up."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._lock.release()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; it is on the disk when this returns.

        Args:
            row: JSON types, its cell's key under `key`.

        Raises:
            DagerError: The disk is full, or gone.
        """
        assert self._file is not None, "a store is written to inside its block"
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:  # a write may be cut short
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            raise DagerError(
                f"{self.folder}: a row cannot be written ({error.strerror}): make room, run again"
            ) from error
        self.rows[row["key"]] = dict(row)

    def _open(self) -> None:
        path = self.folder / ROWS
        self._heal(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        _sync(self.folder)

    def _heal(self, path: Path) -> None:
        """Read the rows; where lines are damaged, keep them beside, and replace the file by one without them."""
        content = path.read_bytes() if path.exists() else b""
        rows, bad = _parsed(content)
        self.rows = {row["key"]: row for row, _ in rows}
        self.damaged = len(bad)
        if not bad:
            return
        with (self.folder / DAMAGED).open("ab") as aside:
            aside.writelines(line + b"\n" for line in bad)
        with files.replacing(path) as partial, partial.open("wb") as whole:
            whole.writelines(line + b"\n" for _, line in rows)
            whole.flush()
            os.fsync(whole.fileno())


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a folder or a file, the latest of each cell; damaged lines are passed over, nothing is written.

    Args:
        path: A folder that a sweep wrote to, or a file of JSON lines.

    Raises:
        DagerError: There are no rows.
    """
    place = Path(path) / ROWS if Path(path).is_dir() else Path(path)
    try:
        rows, _ = _parsed(place.read_bytes())
    except OSError as error:
        raise DagerError(f"{place}: cannot be read ({error.strerror}): give a folder of dager sweep's rows") from error
    if not rows:
        raise DagerError(f"{place}: there are no rows in it: run dager sweep first")
    return list({row["key"]: row for row, _ in rows}.values())


def _parsed(content: bytes) -> tuple[list[tuple[Row, bytes]], list[bytes]]:
    """Rows with their lines, and the lines that are none. A last line that no line feed ends was torn."""
    *lines, tail = content.split(b"\n")
    rows, bad = [], [tail] if tail else []
    for line in lines:
        row = _row(line)
        if row is not None:
            rows.append((row, line))
        elif line:
            bad.append(line)
    return rows, bad


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None


def _sync(folder: Path) -> None:
    """Write a folder's own entries through to the disk, where the system lets one."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
