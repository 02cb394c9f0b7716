"""Which rows of a sweep belong into a cell of a table of the paper, and whose they are.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from dager_tutorial.evaluation.sweep.cells import options_of
from dager_tutorial.evaluation.tables.published import Published

FREE = ("model.", "attack.")
"""Options that a table's cell leaves open: they are said beside the figures."""

FREE_NAMES = ("client.share",)

Row = Mapping[str, Any]


def matches(row: Row, where: Mapping[str, Any], known: Published) -> bool:
    """Whether a row belongs where a table wants it: what is asked for is there, and nothing else was done.

    Args:
        row: A row of a sweep.
        where: Model and attack by the paper's names, corpus, batch size, and options by dotted names.
        known: The names.
    """
    asked = {name: value for name, value in where.items() if "." in name}
    options = options_of(row)
    named = (
        row["model"] in known.models.get(where["model"], [where["model"]])
        and row["attack"] in known.attacks.get(where["attack"], [where["attack"]])
        and PurePath(row["corpus"]).stem == where["corpus"]
        and row["batch_size"] == where.get("batch_size", row["batch_size"])
    )
    return (
        named
        and all(options.get(name) == value for name, value in asked.items())
        and all(name in asked or name.startswith(FREE) or name in FREE_NAMES for name in options)
    )


def whose(row: Row, asked: Iterable[str] = ()) -> str:
    """A row's model and attack for people, with the options that a table leaves open.

    Args:
        row: A row of a sweep.
        asked: Options that the table says itself.

    Example:
        >>> whose({"model": "random:gpt2", "model.blocks": 3, "attack": "dager"})
        'ours: random:gpt2 (3 blocks)'
        >>> whose({"model": "minilm-l6", "attack": "textbook", "attack.cap": 2000})
        'textbook: minilm-l6 (cap 2000)'
    """
    said = []
    for name, value in options_of(row).items():
        if name in asked:
            continue
        short = name.partition(".")[2]
        said.append(f"{value} blocks" if name == "model.blocks" else f"{short} {value}")
    who = "ours" if row["attack"] == "dager" else row["attack"]
    return f"{who}: {row['model']}" + (f" ({', '.join(said)})" if said else "")
