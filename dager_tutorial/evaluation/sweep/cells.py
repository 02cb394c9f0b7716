"""A cell of a sweep: one batch, one client, one attack, as a flat record of JSON values under dotted names.

`model` is a name, `model.blocks` an option of it, `client.dtype` a field of the client's record, and so on. A cell
holds what was asked for and nothing else, so that a new option changes no older cell.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

Cell = dict[str, Any]
"""Dotted name to JSON value."""

AXES = ("model", "corpus", "batch_size", "attack", "seed")
"""What every cell has, besides options."""

OPTIONS = ("model", "client", "training", "adapter", "defence", "attack")
"""Groups of options that a cell may have."""


def key_of(cell: Mapping[str, Any]) -> str:
    """What a cell is known by: the same for the same values, in whatever order they were asked for.

    Args:
        cell: A cell, or a row that begins with one.

    Example:
        >>> key_of({"model": "a", "seed": 0}) == key_of({"seed": 0, "model": "a"}) != key_of({"model": "a", "seed": 1})
        True
    """
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]


def group_of(cell: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The options of one group, without its name.

    Args:
        cell: A cell or a row.
        group: The part of a name before the first dot.

    Example:
        >>> group_of({"model": "a", "model.blocks": 3, "client.task": "masked"}, "model")
        {'blocks': 3}
    """
    return {name.removeprefix(f"{group}."): value for name, value in cell.items() if name.startswith(f"{group}.")}


def options_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a row's cell, by dotted names.

    Args:
        row: A row of a sweep.
    """
    return {name: value for name, value in row.items() if "." in name and name.partition(".")[0] in OPTIONS}


def distinct(cells: Iterable[Cell]) -> dict[str, Cell]:
    """Cells by key, each once, in the order in which they are first met.

    Args:
        cells: Any cells.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(key_of(cell), cell)
    return found
