"""Salted, slow hashes of token ids: they tell whether a text is in a batch, and tell nothing else.

Chapter `16_sealed_envelopes`. Each guess costs a hash of 16 MB and some 50 milliseconds, and each envelope has a salt
of its own, so that no list of texts can be tried on all of them at once. Lists are filled up with random ones to one
length, so that their length does not give the batch size away.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dager_tutorial.errors import DagerError, quote

SEALS = "seals.json"
SLOTS = 16
"""Hashes in each list, true ones and fillers together: the largest batch that can be sealed."""
GOALS = ("whole", "part", "cause")
_COST = {"n": 2**14, "r": 8, "p": 1, "dklen": 32}


@dataclass(frozen=True)
class Seal:
    """What grades the submissions of one envelope.

    Attributes:
        salt: Hexadecimal.
        texts: Hashes of the batch's distinct texts among fillers, sorted.
        batch: Hash of all distinct texts together.
        goal: What full marks need: the `whole` batch, `part` of it, or a written `cause`.
        least: Number of texts that `part` asks for.
        sha256: Of the update file.
    """

    salt: str
    texts: tuple[str, ...]
    batch: str
    goal: str
    least: int
    sha256: str

    def __post_init__(self) -> None:
        """Check the goal, so that no grade has to."""
        if self.goal not in GOALS:
            raise ValueError(f"the goal is {self.goal!r}, not one of {', '.join(GOALS)}")

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether a text is in the batch.

        Args:
            tokens: Its token ids, special ones included.
        """
        return hash_of(self.salt, _spelled(tokens)) in self.texts

    def is_whole(self, texts: Iterable[Sequence[int]]) -> bool:
        """Whether these are all texts of the batch, and no others.

        Args:
            texts: Token ids of each.
        """
        return hash_of(self.salt, _of_batch(texts)) == self.batch


def sealed(texts: Iterable[Sequence[int]], goal: str, least: int, sha256: str) -> Seal:
    """Seal a batch with a fresh salt.

    Args:
        texts: Token ids of each text.
        goal: See `Seal`.
        least: See `Seal`.
        sha256: Of the update file.

    Raises:
        DagerError: There are more distinct texts than a list has room for.

    Example:
        >>> seal = sealed([(5, 7), (9,)], "whole", 2, "")
        >>> seal.holds((5, 7)), seal.holds((5, 7, 0)), len(seal.texts)
        (True, False, 16)
    """
    salt, distinct = secrets.token_hex(16), sorted({tuple(tokens) for tokens in texts})
    if len(distinct) > SLOTS:
        raise DagerError(f"{len(distinct)} texts are too many for one envelope: {SLOTS} at most")
    hashes = [hash_of(salt, _spelled(tokens)) for tokens in distinct]
    fillers = [secrets.token_hex(_COST["dklen"]) for _ in range(SLOTS - len(distinct))]
    whole = hash_of(salt, _of_batch(distinct))
    return Seal(salt, tuple(sorted(hashes + fillers)), whole, goal, least, sha256)


def hash_of(salt: str, content: str) -> str:
    """A slow hash, hexadecimal.

    Args:
        salt: Hexadecimal.
        content: What is hashed.
    """
    return hashlib.scrypt(content.encode("ascii"), salt=bytes.fromhex(salt), **_COST).hex()


def _spelled(tokens: Sequence[int]) -> str:
    return "text " + " ".join(str(int(token)) for token in tokens)


def _of_batch(texts: Iterable[Sequence[int]]) -> str:
    return "batch\n" + "\n".join(sorted({_spelled(tokens) for tokens in texts}))


def read_seals(path: Path, number: int) -> Seal:
    """The seal of one envelope.

    Args:
        path: The file of seals.
        number: The envelope's.

    Raises:
        DagerError: The file cannot be read, is no such file, or lacks the envelope.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))[str(number)]
        return Seal(**record | {"texts": tuple(record["texts"])})
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); build or install the set again") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"holds no seal of envelope {number} ({quote(repr(error))})"
        raise DagerError(f"{path}: {reason}; build or install the set again") from error


def seals_text(seals: Mapping[int, Seal]) -> str:
    """The file of seals.

    Args:
        seals: Envelope number to seal.
    """
    return json.dumps({str(number): asdict(seal) for number, seal in seals.items()}, indent=1) + "\n"
