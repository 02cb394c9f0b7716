"""Grids: what to sweep over, from a YAML file or the command line, every mistake named with its key.

A grid is a mapping of axes; a file holds one, or a list of them under `grids`. Its cells are all combinations.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dager_tutorial.errors import DagerError, quote
from dager_tutorial.evaluation.sweep.cells import Cell, distinct
from dager_tutorial.evaluation.sweep.known import advice

NEEDED = ("models", "corpora", "batch_sizes", "seeds")
AXES = ("models", "corpora", "batch_sizes", "settings", "defences", "attacks", "seeds")
"""In the order in which cells are made: those of one model stand together, so that it is loaded once."""

RANGE = re.compile(r"(\d+)\.\.(\d+)")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # YAML takes 1e-4 for a word
MOST_SEEDS = 10**6

Raw = Mapping[str, Any]


class _Mistakes:
    """What is wrong in one source, gathered so that all of it is said at once."""

    def __init__(self, source: str):
        self.source, self.said = source, list[str]()

    def note(self, key: str, what: str) -> None:
        """Remember a mistake at a key."""
        self.said.append(f"{key}: {what}")

    def close(self) -> None:
        """Raise where there are any."""
        if self.said:
            number = f"{len(self.said)} mistakes: " if len(self.said) > 1 else ""
            raise DagerError(f"{self.source}: {number}{'; '.join(self.said)}")


def read_grids(path: Path) -> list[Raw]:
    """Read a YAML file of grids, unchecked.

    Args:
        path: The file.

    Raises:
        DagerError: It cannot be read, is no YAML, or holds no grid.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DagerError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    if isinstance(content, dict) and set(content) == {"grids"}:
        content = content["grids"]
    grids = content if isinstance(content, list) else [content]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        raise DagerError(f"{path}: give a mapping of {', '.join(AXES)}, or a list of such mappings under grids")
    return grids


def read_axes(given: Sequence[str]) -> dict[str, Any]:
    """Axes as the command line gives them: `axis=value`, the value as in YAML, brackets left out around a list.

    Args:
        given: One an axis.

    Raises:
        DagerError: One is not of this form.

    Example:
        >>> read_axes(["batch_sizes=1, 2", "models=random:gpt2", "settings={client: {dtype: float64}}"])
        {'batch_sizes': [1, 2], 'models': ['random:gpt2'], 'settings': [{'client': {'dtype': 'float64'}}]}
    """
    axes = {}
    for each in given:
        name, equals, value = each.partition("=")
        try:
            parsed = yaml.safe_load(value if value.lstrip().startswith("[") else f"[{value}]")
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise DagerError(f"--vary {quote(each)}: write AXIS=VALUE,VALUE with values as in YAML")
        axes[name.strip()] = parsed
    return axes


def cells_of(grids: Sequence[Raw], source: str) -> list[Cell]:
    """All cells of some grids, each once.

    Args:
        grids: Mappings of axes.
        source: Where they come from, for messages.

    Raises:
        DagerError: Anything is not as it should be; all mistakes are named with their keys.
    """
    mistakes, cells = _Mistakes(source), list[Cell]()
    for place, grid in enumerate(grids):
        cells += _cells(grid, f"grids[{place}]." if len(grids) > 1 else "", mistakes)
    mistakes.close()
    return list(distinct(cells).values())


def _cells(grid: Raw, prefix: str, mistakes: _Mistakes) -> Iterator[Cell]:
    for name in grid:
        if name not in AXES:
            mistakes.note(f"{prefix}{name}", f"no such axis, {advice(str(name), AXES)}")
    for name in NEEDED:
        if name not in grid:
            mistakes.note(f"{prefix}{name}", "is missing")
    axes = [_axis(name, grid.get(name), prefix, mistakes) for name in AXES]
    for parts in itertools.product(*axes):
        yield {name: value for part in parts for name, value in part.items()}


def _axis(name: str, values: Any, prefix: str, mistakes: _Mistakes) -> list[Cell]:
    """The points of an axis, each as a part of a cell."""
    if values is None:
        return {"attacks": [{"attack": "dager"}]}.get(name, [{}])
    points = []
    for place, value in enumerate(values if isinstance(values, list) else [values]):
        key = f"{prefix}{name}[{place}]" if isinstance(values, list) else f"{prefix}{name}"
        try:
            points += _POINTS[name](value)
        except DagerError as error:
            mistakes.note(key, str(error))
    if isinstance(values, list) and not values:
        mistakes.note(f"{prefix}{name}", "is empty")
    return points


def _named(column: str, value: Any) -> list[Cell]:
    """A name, or a mapping of a name and options."""
    if isinstance(value, str) and value:
        return [{column: value}]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise DagerError(f"is {quote(value)}: give a name, or a mapping with name and options")
    return [{column: value["name"]} | _flat(column, {key: each for key, each in value.items() if key != "name"})]


def _settings(value: Any) -> list[Cell]:
    """A mapping of groups of options; nothing for a client as it is by default."""
    if value is None or value == "default":
        return [{}]
    if not isinstance(value, dict) or not all(isinstance(options, dict) for options in value.values()):
        raise DagerError(f"is {quote(value)}: give groups of options, such as {{client: {{dtype: float64}}}}")
    return [{name: each for group, options in value.items() for name, each in _flat(str(group), options).items()}]


def _defences(value: Any) -> list[Cell]:
    """Defences in their order, each with its options; nothing for none."""
    if value is None or value == "none":
        return [{}]
    chain = value.items() if isinstance(value, dict) else ()
    if not chain or not all(isinstance(options, dict) and options for _, options in chain):
        raise DagerError(
            f"is {quote(value)}: give none, or defences with options, such as {{noise: {{deviation: 1e-4}}}}"
        )
    return [{name: each for kind, options in chain for name, each in _flat(f"defence.{kind}", options).items()}]


def _sizes(value: Any) -> list[Cell]:
    if type(value) is not int or value < 1:
        raise DagerError(f"is {quote(value)}: give a whole number from 1")
    return [{"batch_size": value}]


def _seeds(value: Any) -> list[Cell]:
    """A number, or a range `first..last`."""
    found = RANGE.fullmatch(value) if isinstance(value, str) else None
    if found:
        first, last = map(int, found.groups())
        if first <= last < first + MOST_SEEDS:
            return [{"seed": seed} for seed in range(first, last + 1)]
    elif type(value) is int and value >= 0:
        return [{"seed": value}]
    raise DagerError(f"is {quote(value)}: give a whole number from 0, or a range such as 0..9")


def _flat(group: str, options: Mapping[Any, Any]) -> Cell:
    """Options under dotted names."""
    flat = {}
    for name, value in options.items():
        plain = value is None or isinstance(value, str | int | float)
        if not plain and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise DagerError(f"{group}.{name} is {quote(value)}: give a number, a word, or a list of words")
        flat[f"{group}.{name}"] = float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value
    return flat


_POINTS = {
    "models": lambda value: _named("model", value),
    "corpora": lambda value: _named("corpus", value),
    "batch_sizes": _sizes,
    "settings": _settings,
    "defences": _defences,
    "attacks": lambda value: _named("attack", value),
    "seeds": _seeds,
}
