"""The texts of a set, locked with the instructor's key: `python -m dager_tutorial.challenges.answers --help`.

Chapter `16_sealed_envelopes`. The file comes with the set, the key does not: it is neither in the package nor in the
repository. Needs the extra `instructor` (the package cryptography).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from dager_tutorial.challenges.registry import SHIPPED
from dager_tutorial.errors import DagerError

ANSWERS = "answers.sealed"
_PAGE = 8192  # answers are filled up to so many characters, so that the file's length says little of the texts


def locked(answers: dict[str, Any], key: bytes) -> bytes:
    """Encrypt the answers.

    Args:
        answers: Envelope number to its private record, JSON types only.
        key: What `new_key` drew.
    """
    content = json.dumps(answers)
    return _cipher(key).encrypt(content.ljust(-(-len(content) // _PAGE) * _PAGE).encode())


def unlocked(content: bytes, key: bytes) -> dict[str, Any]:
    """Decrypt the answers.

    Args:
        content: What `locked` made.
        key: The instructor's key.

    Raises:
        DagerError: It is another key, or the file is damaged.
    """
    cipher = _cipher(key)
    from cryptography.fernet import InvalidToken

    try:
        return dict(json.loads(cipher.decrypt(content)))
    except InvalidToken:
        raise DagerError("the key does not open these answers: use the one that the set was built with") from None


def new_key() -> bytes:
    """Draw a key."""
    return _fernet().generate_key()


def read_key(path: Path) -> bytes:
    """Read a key.

    Args:
        path: A file that holds it.

    Raises:
        DagerError: The file cannot be read.
    """
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); name the instructor's key") from error


def write_key(path: Path, key: bytes) -> None:
    """Write a key so that only its owner may read it; an older file is never replaced.

    Args:
        path: A new file outside the set.
        key: The key.

    Raises:
        DagerError: It exists, or cannot be written.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key + b"\n")
    except OSError as error:
        raise DagerError(f"{path}: the key cannot be written ({error.strerror}); choose another place") from error


def _cipher(key: bytes) -> Any:
    """The cipher of a key."""
    try:
        return _fernet()(key)
    except ValueError:
        raise DagerError("that is no key: a key is one line of 44 characters") from None


def _fernet() -> Any:
    """AES-128-CBC with HMAC-SHA256, from the package cryptography."""
    try:
        from cryptography.fernet import Fernet
    except ImportError:
        raise DagerError("answers need the package cryptography: pip install 'dager-tutorial[instructor]'") from None
    return Fernet


def main(arguments: list[str] | None = None) -> int:
    """Print the answers of a set.

    Args:
        arguments: The command line's; the process's by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m dager_tutorial.challenges.answers", description=main.__doc__)
    parser.add_argument("key", type=Path, help="the file with the instructor's key")
    parser.add_argument("number", nargs="?", help="the envelope to open; all by default")
    parser.add_argument("--set", dest="folder", type=Path, default=SHIPPED, help="a folder with a set of envelopes")
    given = parser.parse_args(arguments)
    try:
        answers = unlocked(read_key(given.folder / ANSWERS), read_key(given.key))
        chosen = {given.number: answers[given.number]} if given.number in answers else answers
        print(json.dumps(chosen, indent=1, ensure_ascii=False))
    except DagerError as error:
        print(f"answers: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
