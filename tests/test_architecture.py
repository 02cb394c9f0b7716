"""The rules of the architecture: who may import whom (`[tool.importlinter]`), and the shape of files and functions."""

from __future__ import annotations

import ast
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from importlinter import api
from importlinter.application import use_cases

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "pyproject.toml"
FILES = sorted((ROOT / "dager_tutorial").rglob("*.py"))
DOWNWARDS, NO_TRUTH, ORACLE, STAGES, NO_CIRCLE = (
    contract["name"] for contract in api.read_configuration(str(CONFIG))["contracts_options"]
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


# ---- imports


def test_every_contract_is_kept():
    kept = use_cases.lint_imports(str(CONFIG), cache_dir=None, no_logo=True)
    assert kept, "the chains of imports are printed above"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its contracts in another folder."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "dager_tutorial", folder / "dager_tutorial", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CONFIG, folder)
    return folder


def lint(folder: Path) -> str:
    """What `lint-imports` prints of the package in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    run = subprocess.run([*command, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True, check=False)
    return run.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("server/subspace.py", "from dager_tutorial import client_update", NO_TRUTH),
        ("server/budget.py", "def f():\n    from dager_tutorial.data import read_corpus", NO_TRUTH),
        ("textbook/decoder.py", "if TYPE_CHECKING:\n    import dager_tutorial.evaluation.metrics", NO_TRUTH),
        ("update.py", "from dager_tutorial.zoo.names import load_model", NO_TRUTH),  # reached through another file
        ("baselines/dlg.py", "from dager_tutorial.client.step import play", NO_TRUTH),
        ("server/attack.py", "from dager_tutorial.baselines.told import Told", DOWNWARDS),
        ("textbook/encoder.py", "from dager_tutorial.server.rank import gap", ORACLE),
        ("client/step.py", "from dager_tutorial.server import constants", ORACLE),
        ("server/evidence.py", "from dager_tutorial.server.token_filter import filter_tokens", STAGES),
        ("server/encoder/run.py", "from dager_tutorial.server.decoder import tree", STAGES),
        ("server/fresh.py", "", STAGES),
        ("models/tap.py", "from dager_tutorial.models import gpt2", NO_CIRCLE),
        ("errors.py", "from dager_tutorial.models import tap", DOWNWARDS),
        ("zoo/cache.py", "from dager_tutorial.client import step", DOWNWARDS),
        ("fresh.py", "", DOWNWARDS),
    ],
)
def test_a_contract_breaks_where_it_should(file, line, broken, copy):
    path = copy / "dager_tutorial" / file
    before = path.read_text("utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n", "utf-8")
    try:
        assert f"{broken} BROKEN" in lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before, "utf-8")


# ---- shape


class Measured(NamedTuple):
    """A function: where it stands, its syntax tree, whether others may call it."""

    place: str
    node: Function
    public: bool


def functions() -> Iterator[Measured]:
    """Every function and method of the package, those within functions included."""
    for path in FILES:
        yield from _functions_in(ast.parse(path.read_text("utf-8")), str(path.relative_to(ROOT)), True)


def _functions_in(node: ast.AST, place: str, public: bool) -> Iterator[Measured]:
    for child in ast.iter_child_nodes(node):
        inside = public
        if isinstance(child, Function | ast.ClassDef):
            named, inside = f"{place}:{child.name}", public and not child.name.startswith("_")
            if isinstance(child, Function):
                yield Measured(named, child, inside)
                inside = False  # nobody calls what is within a function
            yield from _functions_in(child, named, inside)
        else:
            yield from _functions_in(child, place, inside)


FUNCTIONS = list(functions())


def body_lines(node: Function) -> int:
    """Lines of a function's body, its docstring left out."""
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def test_functions_are_measured_as_a_reader_counts():
    source = 'def f(\n    a,\n):\n    """Doc.\n\n    More.\n    """\n\n    x = (\n        a\n    )\n    return x\n'
    nested = 'def f():\n    """Doc."""\n    def g():\n        return 1\n    # why\n    return g\n'
    stub = 'def f(self): """Doc."""\n'
    assert [body_lines(ast.parse(text).body[0]) for text in (source, nested, stub)] == [4, 4, 0]
    methods = "class A:\n    def b(self): ...\n    def _c(self): ...\nclass _D:\n    def e(self): ...\n"
    shown = list(_functions_in(ast.parse(methods + nested), "", True))
    assert [each.place for each in shown if each.public] == [":A:b", ":f"] and len(shown) == 5


def test_no_file_is_long():
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 300} == {}


def test_functions_are_short():
    lines = {f"{each.place} (line {each.node.lineno})": body_lines(each.node) for each in FUNCTIONS}
    assert {name: count for name, count in lines.items() if count > 40} == {}
    assert statistics.median(lines.values()) <= 5
    assert np.percentile(list(lines.values()), 90) <= 14


def test_constructors_take_few_arguments():
    wide = {}
    for each in FUNCTIONS:
        taken = each.node.args
        count = len(taken.posonlyargs + taken.args + taken.kwonlyargs) + bool(taken.vararg) + bool(taken.kwarg)
        if each.node.name == "__init__" and count > 7:  # self is one of them
            wide[each.place] = count - 1
    assert wide == {}


def test_what_others_may_call_is_described():
    assert [each.place for each in FUNCTIONS if each.public and not ast.get_docstring(each.node)] == []


def test_files_say_what_they_are_for():
    assert [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))] == []
