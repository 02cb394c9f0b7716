"""The table of the attack's numbers, for those who read or vary them (chapters `04_noise` and `11_limits`)."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from dager_tutorial.server.constants import Constants


class ConstantRecord(NamedTuple):
    """One line of the table.

    Attributes:
        name: The field of `Constants`.
        value: Its value.
        meaning: What it is, one phrase.
        origin: Where it comes from: chosen, measured, statistics, numerics or cost (results do not depend on it).
    """

    name: str
    value: float
    meaning: str
    origin: str


def constant_table() -> list[ConstantRecord]:
    """The constants with meaning and origin, in the order of the attack.

    >>> constant_table()[0].name
    'miss_rate'
    """
    return [
        ConstantRecord(each.name, each.default, each.metadata["meaning"], each.metadata["origin"])
        for each in fields(Constants)
        if isinstance(each.default, (int, float))
    ]
