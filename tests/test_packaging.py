"""What is declared is what is imported, what is pinned fits what is declared, and the targets of the Makefile."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dager_tutorial"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
READS_GGUF = {"gguf"}  # imported by transformers when it reads SmolLM2's file, not by this package
PYTHONS = ("3.11", "3.13", "3.14")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def requirements_in(lines: list[str]) -> list[Requirement]:
    stripped = (line.partition("#")[0].strip() for line in lines)
    return [Requirement(line) for line in stripped if line]


def names_of(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements}


RUNTIME = requirements_in((ROOT / "requirements.txt").read_text("utf-8").splitlines())
EXTRAS = {
    extra: [each for each in requirements_in(lines) if each.name != "dager-tutorial"]
    for extra, lines in PROJECT["project"]["optional-dependencies"].items()
}
PINS = requirements_in((ROOT / "constraints.txt").read_text("utf-8").splitlines())
DISTRIBUTIONS = packages_distributions()


def imported(path: Path) -> set[str]:
    """Distributions that a file imports from, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    foreign = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"dager_tutorial"}
    return {canonicalize_name(DISTRIBUTIONS.get(module, [module])[0]) for module in foreign}


IMPORTED = {str(path.relative_to(PACKAGE)): imported(path) for path in PACKAGE.rglob("*.py")}


def test_what_is_imported_is_declared():
    extra_of = {
        "data.py": "datasets",
        "teaching": "notebooks",
        "cli/picture.py": "notebooks",
        "challenges": "instructor",
        "client/adapters.py": "adapters",
        "evaluation/sweep/pool.py": "dask ray",
        "frameworks/nvflare.py": "nvflare",
        "frameworks/opacus.py": "opacus",
    }
    for file, distributions in IMPORTED.items():
        extra = extra_of.get(file) or extra_of.get(Path(file).parts[0], "")
        if file.startswith("frameworks/flower/"):
            extra = "flower"
        declared = names_of([*RUNTIME, *(each for name in extra.split() for each in EXTRAS[name])])
        assert distributions <= declared, file


def test_what_is_declared_is_imported():
    used = set().union(*IMPORTED.values())
    assert names_of(RUNTIME) - used == READS_GGUF
    assert names_of(EXTRAS["notebooks"]) | names_of(EXTRAS["datasets"]) <= used


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_once_and_within_its_range(python):
    pins = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len(names_of(pins)) == len(pins)
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    wanted = RUNTIME + [each for extra, many in EXTRAS.items() if extra != "datasets" for each in many]
    for each in wanted:
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each


def test_colabs_versions_are_admitted_and_so_are_the_newest():
    colab = {"torch": "2.11.0", "transformers": "5.15.0", "numpy": "2.1.0", "ipywidgets": "7.7.1", "ipython": "7.34.0"}
    newest = {"torch": "2.15.0", "transformers": "5.24.0"}
    ranges = {each.name: each.specifier for each in RUNTIME + EXTRAS["notebooks"]}
    for name, version in [*colab.items(), *newest.items()]:
        assert ranges[name].contains(version), name


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {".".join(folder.parts) for folder in folders} | {"dager_tutorial.texts"}
    hidden = ("__pycache__", ".")
    data = [path for path in PACKAGE.rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    for path in (path.relative_to(ROOT) for path in data):
        if not any(part.startswith(hidden) for part in path.parts):
            assert path.name in PROJECT["tool"]["setuptools"]["package-data"][".".join(path.parent.parts)]


# ---- the Makefile


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do in a fresh clone."""
    quiet = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--dry-run", "VENV=absent", *arguments]
    return subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)


def test_pytorch_alone_comes_from_the_index_of_cpu_builds_and_only_when_asked():
    plain, cpu = make("setup").stdout, make("setup", "TORCH=cpu").stdout
    assert "index-url" not in plain
    asked = [line for line in cpu.splitlines() if "index-url" in line]
    assert len(asked) == 1 and asked[0].endswith(f"--constraint constraints.txt --extra-index-url {CPU_BUILDS} torch")
    assert cpu.index(asked[0]) < cpu.index("--editable .")


@pytest.mark.parametrize("target", ["setup", "demo"])
def test_how_much_is_fetched_is_said_before_anything_is(target):
    lines = make(target).stdout.splitlines()
    said = next(index for index, line in enumerate(lines) if "to fetch" in line)
    assert said < next(index for index, line in enumerate(lines) if "pip install" in line)
    assert "MB" in lines[said] and "\\" not in lines[said]


def test_the_demo_installs_no_tools_and_the_tests_add_them_to_the_same_environment():
    demo, tests = make("demo").stdout, make("test").stdout
    assert "dev" not in demo and "absent/bin/dager demo" in demo
    assert tests.count("-m venv absent") == 1 and "--editable '.[dev,book]'" in tests


def test_another_kind_of_pytorch_is_refused():
    run = make("setup", "TORCH=gpu")
    assert run.returncode and "TORCH=cpu" in run.stderr


def test_continuous_integration_runs_targets_that_there_are():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    job = workflow["jobs"]["check"]
    assert tuple(job["strategy"]["matrix"]["python"]) == PYTHONS and job["env"] == {"TORCH": "cpu"}
    steps = [step["run"].removeprefix("make ") for step in job["steps"] if "run" in step]
    called = re.findall(r"^ *make (\w+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert {"test", "lint", "pages"} <= set(called) & set(steps)
    for target in {*called, *steps}:
        assert make(target).returncode == 0, target
