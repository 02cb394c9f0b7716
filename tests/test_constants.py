"""The one table of numbers: whole, explained, used, and varied without a trace."""

from __future__ import annotations

import ast
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from scipy.stats import norm

import dager_tutorial.server
from dager_tutorial.server.constant_table import constant_table
from dager_tutorial.server.constants import Constants, constants, varied
from dager_tutorial.server.odds import MEDIAN_TO_DEVIATION

SERVER = Path(dager_tutorial.server.__file__).parent
IDENTITIES = {"MEDIAN_TO_DEVIATION"}  # mathematics, nothing to vary
ORIGINS = ("chosen", "measured", "statistics", "numerics", "cost")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SERVER.rglob("*.py")):
        yield path.relative_to(SERVER).as_posix(), ast.parse(path.read_text("utf-8"))


def read_from_the_table(tree: ast.AST) -> list[str]:
    """Names of constants that are read as `constants().name`."""
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "constants"
    ]


def test_every_constant_is_used_and_no_other() -> None:
    used = Counter(name for file, tree in trees() if file != "constants.py" for name in read_from_the_table(tree))
    assert set(used) == {each.name for each in fields(Constants)}


def test_every_constant_is_explained() -> None:
    table = constant_table()
    assert [each.name for each in table] == [each.name for each in fields(Constants)]
    for each in table:
        assert each.value == getattr(constants(), each.name) > 0
        assert len(each.meaning.split()) > 3 and each.meaning.isprintable()
        assert each.origin.split(":")[0] in ORIGINS, each


def numbers_of_their_own(tree: ast.Module) -> list[str]:
    """Names in capitals that a module or a class gives a number to, or anything that is computed of numbers alone."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        for statement in node.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            value = getattr(statement, "value", None)
            names = [each.id for each in targets if isinstance(each, ast.Name) and each.id.isupper()]
            if names and value is not None and all(_is_arithmetic(each) for each in ast.walk(value)):
                found += names
    return found


def _is_arithmetic(node: ast.AST) -> bool:
    plain = (ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Tuple, ast.Load)
    return isinstance(node, plain) or (isinstance(node, ast.Constant) and isinstance(node.value, int | float))


def test_numbers_of_their_own_are_recognised() -> None:
    source = "A = 3\nB: float = -2.0 ** 23\nC = 'x'\nd = 4\nE = f(3)\nclass F:\n    G = (1, 2)\ndef h():\n    I = 4\n"
    assert sorted(numbers_of_their_own(ast.parse(source))) == ["A", "B", "G"]


def test_no_other_file_keeps_a_number_of_its_own() -> None:
    assert {name for _, tree in trees() for name in numbers_of_their_own(tree)} == IDENTITIES
    assert pytest.approx(1 / norm.ppf(0.75), rel=1e-4) == MEDIAN_TO_DEVIATION


def test_varied_numbers_hold_for_the_block_alone() -> None:
    usual = constants()
    with varied(clear_gap=60.0, sweeps=5):
        assert (constants().clear_gap, constants().sweeps) == (60.0, 5)
        with pytest.raises(ZeroDivisionError), varied(clear_gap=7.0):
            assert (constants().clear_gap, constants().sweeps) == (7.0, 5)
            1 / 0  # noqa: B018
        assert (constants().clear_gap, constants().sweeps) == (60.0, 5)
    assert constants() is usual


def test_varied_numbers_are_unknown_to_other_threads() -> None:
    seen: list[float] = []

    def read() -> None:
        seen.append(constants().clear_gap)

    with varied(clear_gap=60.0):
        other = threading.Thread(target=read)
        other.start()
        other.join()
    assert seen == [Constants().clear_gap]


def test_an_unknown_number_cannot_be_varied() -> None:
    with pytest.raises(TypeError, match="tau"), varied(tau=1e-5):
        raise AssertionError
    assert constants() == Constants()


def test_no_number_is_varied_by_accident() -> None:
    with pytest.raises(AttributeError):
        constants().clear_gap = 3.0  # type: ignore[misc]
