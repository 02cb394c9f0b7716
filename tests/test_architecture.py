"""Files import one way, and the attack's side never sees a batch (the rule of the architecture)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dager_tutorial"
# Each file imports only from those before it. "models" and "" stand for the `__init__` of the packages.
# fmt: off
ORDER = (
    "errors", "update", "reconstruction",
    "models.base", "models.gpt2", "models.llama", "models.bert", "models.distilbert", "models.roberta", "models",
    "models.cache", "models.checkpoint", "models.hub", "models.smollm2", "models.wheels", "models.pinned",
    "models.zoo",
    "client", "subspace", "token_filter", "unmixing", "simplex", "rounding", "evidence",
    "decoder", "encoder", "saturated", "sentences", "run", "decoder_run", "encoder_run", "attack",
    "metrics", "textbook", "textbook_encoder", "data", "benchmark", "benchmark_encoder",
    "checks.common", "checks.gradients_leak", "checks.low_rank", "checks.token_filter", "checks.decoder_recovery",
    "checks.encoder_recovery", "checks.whole_attack", "checks.when_it_breaks", "checks",
    "plotting", "display", "widgets", "demo", "",
    "cli",
)
# fmt: on
ATTACK_SIDE = (
    "subspace",
    "unmixing",
    "simplex",
    "token_filter",
    "rounding",
    "evidence",
    "decoder",
    "encoder",
    "saturated",
    "sentences",
    "run",
    "decoder_run",
    "encoder_run",
    "attack",
    "textbook",
    "textbook_encoder",
)
SEES_A_BATCH = {
    "",
    "client",
    "data",
    "metrics",
    "benchmark",
    "benchmark_encoder",
    "checks",
    "plotting",
    "demo",
    "display",
    "widgets",
    "cli",
}


def module_name(path: Path) -> str:
    """Name within the package: `models.gpt2`, `models` for its `__init__`, "" for the package itself."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(source: str, package: list[str], modules: set[str]) -> set[str]:
    """Modules of the package that a source imports, anywhere in it and in any spelling.

    Args:
        source: The Python source.
        package: The parts of the package that holds it, `["dager_tutorial", "models"]` for one.
        modules: The names of all modules, to tell `from .models import base` from an attribute.
    """
    dotted = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inside = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            names = {name for name, full in inside.items() if full.removeprefix(f"{ROOT.name}.") in modules}
            dotted |= {inside[name] for name in names} | ({base} if names != set(inside) else set())
    own = {name for name in dotted if name == ROOT.name or name.startswith(f"{ROOT.name}.")}
    return {name.removeprefix(ROOT.name).removeprefix(".") for name in own}


def imports_of(module: str) -> set[str]:
    path = FILES[module]
    package = [ROOT.name, *path.relative_to(ROOT).parent.parts]
    return imported(path.read_text("utf-8"), package, set(FILES))


@pytest.mark.parametrize("module", sorted(name for name in FILES if FILES[name].name != "__init__.py"))
def test_imports_go_one_way(module):
    assert module in ORDER, f"give {module} its place in ORDER"
    above = set(ORDER[: ORDER.index(module)])
    assert imports_of(module) <= above


@pytest.mark.parametrize("module", [name for name in ATTACK_SIDE if name in FILES])
def test_the_attack_never_sees_a_batch(module):
    reached, to_visit = set(), {module}
    while to_visit:
        reached |= to_visit
        to_visit = set().union(*(imports_of(name) for name in to_visit if name in FILES)) - reached
    assert not reached & SEES_A_BATCH


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\nfrom os import path", set()),
        ("from ..client import encode", {"client"}),
        ("from .. import client, errors", {"client", "errors"}),
        ("from .. import load_model", {""}),
        ("from . import base, adapter_for", {"models", "models.base"}),
        ("from .base import Tap", {"models.base"}),
        ("import dager_tutorial.client.step as c", {"client"}),
        ("import dager_tutorial", {""}),
        ("from dager_tutorial.models import base", {"models.base"}),
        ("def f():\n    if TYPE_CHECKING:\n        from dager_tutorial import client", {"client"}),
        ("import dager_tutorial_extra.client", set()),
    ],
)
def test_every_spelling_of_an_import_is_found(source, expected):
    modules = {"", "client", "errors", "models", "models.base"}
    assert imported(source, ["dager_tutorial", "models"], modules) == expected
