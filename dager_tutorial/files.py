"""Files: outputs are checked before any work and replaced when all is written, inputs before a parser sees them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dager_tutorial.errors import DagerError, UpdateError


def writable(path: Path) -> Path:
    """Refuse an output that cannot be written, before any work is done for it.

    Args:
        path: What the user named.

    Returns:
        The file to write: the path itself, or what a symbolic link points to.

    Raises:
        DagerError: It is a folder, a device, a pipe or a socket, its folder does not exist, or it may not be written.
    """
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        there, folder = _mode(target), _mode(target.parent)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise DagerError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    if there is not None and stat.S_ISDIR(there):
        raise DagerError(f"{path}: is a folder; name a file in it")
    if there is not None and not stat.S_ISREG(there):
        raise DagerError(f"{path}: is no regular file but a device, a pipe or a socket; choose another place")
    if folder is None:
        raise DagerError(f"{path}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK) or (there is not None and not os.access(target, os.W_OK)):
        raise DagerError(f"{path}: may not be written; choose another place")
    return target


def _mode(path: Path) -> int | None:
    """What kind of thing is there, as `stat` tells it; None for nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside the one to write, which takes its place when the block has ended well.

    Args:
        path: The file to write, or a symbolic link to it, which stays a link.

    Raises:
        DagerError: See `writable`.
        OSError: Writing fails.
    """
    target = writable(path)
    partial = target.with_name(f".{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_safetensors(path: Path) -> None:
    """Tell apart the ways in which a path is no safetensors file, before the parser sees it.

    Args:
        path: What the user named.

    Raises:
        UpdateError: It is none. One line, which says what to do.
        OSError: It cannot be read.
    """
    if not path.exists():
        raise UpdateError("no such file: check the path")
    if not path.is_file():
        raise UpdateError("not a file: name one safetensors file")
    size = path.stat().st_size
    if size == 0:
        raise UpdateError("the file is empty: capture or copy the update again")
    with path.open("rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    if brace not in (b"{", b"") or size < 8:  # the header is JSON text after eight bytes of length
        raise UpdateError("not a safetensors file: only safetensors is read (pickled .pt and .bin files never are)")
    if length > size - 8:
        raise UpdateError("the file is truncated, or not safetensors: copy or capture the update again")
