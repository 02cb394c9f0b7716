"""Folders made once and trusted afterwards: built aside, moved into place whole, checked at every use.

An interrupted build leaves nothing behind that could be taken for a finished one, two processes that start
together build once, and a file that was cut short or changed is noticed and the folder made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from dager_tutorial.errors import ModelError

MANIFEST = "manifest.json"
OTHER_CACHE = "make room, or choose another cache folder with DAGER_CACHE"


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where fetched and converted models are kept.

    Args:
        cache: A folder that overrules everything else.

    Returns:
        `cache`, else the environment's `DAGER_CACHE`, else `dager-tutorial` in the user's cache folder
        (on Linux `XDG_CACHE_HOME`, or `~/.cache`). It may not exist yet.
    """
    chosen = cache or os.environ.get("DAGER_CACHE") or user_cache_path("dager-tutorial", appauthor=False)
    return Path(chosen).expanduser().absolute()


def sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(folder: Path, recipe: str) -> bool:
    """Whether a folder is the finished, unchanged result of a recipe.

    Sizes are always compared. Contents are read only where the modification time differs from the recorded
    one, so that the usual check of half a gigabyte takes microseconds.

    Args:
        folder: A folder that `built_once` may have made.
        recipe: The text it was, or would be, made under.

    Returns:
        True if the manifest names this recipe and every file in it is as it was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["recipe"] != recipe:
            return False
        return all(_is_unchanged(folder / name, entry) for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_unchanged(path: Path, entry: dict) -> bool:
    found = path.stat()
    if found.st_size != entry["size"]:
        return False
    return found.st_mtime_ns == entry["mtime_ns"] or sha256(path) == entry["sha256"]


def built_once(folder: Path, recipe: str, build: Callable[[Path], None]) -> Path:
    """Make a folder unless it is already there and intact.

    Args:
        folder: Where the result belongs.
        recipe: A text that changes whenever the result would; a folder made under another one is replaced.
        build: Called with an empty folder to fill; what it leaves there becomes the result.

    Returns:
        `folder`, complete.

    Raises:
        ModelError: The cache cannot be written.
    """
    if is_intact(folder, recipe):
        return folder
    with writing(folder.parent, OTHER_CACHE), FileLock(folder.with_name(f".{folder.name}.lock")):
        if not is_intact(folder, recipe):  # another process may have built it while this one waited
            _build(folder, recipe, build)
    return folder


@contextmanager
def writing(folder: Path, advice: str) -> Iterator[None]:
    """Create a folder and turn a failure to write (no permission, no space) into one line that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"cannot write in {folder} ({reason}): {advice}") from error


@contextmanager
def workshop(folder: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder inside another one, so that what was made there can be moved out in one step."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as place:
        yield Path(place)


def _build(folder: Path, recipe: str, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.building-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of an interrupted run: the lock is ours now
        shutil.rmtree(leftover, ignore_errors=True)
    with workshop(folder.parent, prefix) as place:
        made = place / "made"
        made.mkdir()
        build(made)
        (made / MANIFEST).write_text(json.dumps(_manifest(made, recipe), indent=1))
        if folder.exists():
            folder.replace(place / "damaged")
        made.replace(folder)


def _manifest(folder: Path, recipe: str) -> dict:
    files = {}
    for path in sorted(folder.iterdir()):
        found = path.stat()
        files[path.name] = {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": sha256(path)}
    return {"recipe": recipe, "files": files}
