"""Options that declare what they may be: one check serves them all, and stands beside each field.

Chapter `01_gradients_leak`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from dager_tutorial.errors import DagerError, quote


@dataclass(frozen=True)
class OneOf:
    """One of some words.

    Attributes:
        choices: The words.
        names: Whether a tuple of parameter names, not an empty one, serves, too.

    Example:
        >>> OneOf(("left", "right")).allows("top"), OneOf(("all",), names=True).allows(("score.weight",))
        (False, True)
    """

    choices: tuple[str, ...]
    names: bool = False

    @property
    def advice(self) -> str:
        """What to give instead."""
        listed = ", ".join(self.choices)
        return f"choose {listed}, or a list of parameter names" if self.names else f"choose one of {listed}"

    def allows(self, value: object) -> bool:
        """Whether the value is one of the words, or names where names serve."""
        if self.names and isinstance(value, tuple):
            return bool(value) and all(isinstance(name, str) for name in value)
        return isinstance(value, str) and value in self.choices


@dataclass(frozen=True)
class Within:
    """A finite number in a range, both ends included.

    Attributes:
        low: The smallest.
        high: The largest.
        whole: Whether it must be an integer.
        optional: Whether None serves, too.

    Example:
        >>> Within(1, optional=True).allows(None), Within(0, whole=False).allows(float("nan"))
        (True, False)
    """

    low: float
    high: float = sys.float_info.max
    whole: bool = True
    optional: bool = False

    @property
    def advice(self) -> str:
        """What to give instead."""
        end = "on" if self.high == sys.float_info.max else f"to {self.high}"
        return f"give a {'whole ' * self.whole}number from {self.low} {end}{', or None' * self.optional}"

    def allows(self, value: Any) -> bool:
        """Whether the value is such a number."""
        if value is None:
            return self.optional
        number = isinstance(value, Integral if self.whole else Real)
        return number and bool(self.low <= value <= self.high)


def option(default: Any, constraint: OneOf | Within, help: str) -> Any:
    """A dataclass field that says what it is for (`metadata["help"]`) and may be (`metadata["constraint"]`).

    Args:
        default: Its value where none is given.
        constraint: What it may be.
        help: What it is for, in one sentence.
    """
    return field(default=default, metadata={"constraint": constraint, "help": help})


def check_options(record: Any) -> None:
    """Refuse a record whose options are not all what they may be.

    Args:
        record: An instance of a dataclass, all of whose fields are made by `option`.

    Raises:
        DagerError: It names the first option that is wrong, its value, and what to give instead.
    """
    for each in fields(record):
        value, constraint = getattr(record, each.name), each.metadata["constraint"]
        if not constraint.allows(value):
            shown = value if isinstance(value, Real) else quote(value)
            raise DagerError(f"{each.name} is {shown}: {constraint.advice}")
