"""The notebooks as files: what nbval does not look at, and the exercises with their stubs and solutions.

nbval (strict, over every notebook, in the same pytest run) executes the cells and compares what they print. It passes
a cell without an execution count, an unknown magic and a notebook that was never run; the tests here do not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml

from dager_tutorial.checks.limits import STATUSES, Counts
from dager_tutorial.server.outcome import Ends
from dager_tutorial.server.verdict import of_prefixes

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]
TAGS = {"colab", "exercise", "hide-cell", "hide-input", "hide-output", "nbval-ignore-output", "raises-exception"}
TAGS |= {"remove-cell", "remove-input", "slide", "slide-code", "slide-more", "solution"}
SPELLED = {  # as the book does not write it: as it does
    "nonzero": "non-zero",
    "optimiz": "optimis",
    "normaliz": "normalis",
    "color": "colour",
    "behavior": "behaviour",
    "defense": "defence",
    "minibatch": "batch",
    "mini-batch": "batch",
    "word piece": "token",
    "embedding dimension": "width",
    "hidden dimension": "width",
}
PARTS = ("**The question.**", "**After this chapter you can**", "**Before you start.**", "**Cost.**")
SECTIONS = ("## What defends", "## Exercises", "## Recap")
LONGEST_CELL, LARGEST_FILE = 30, 1_500_000
CHECK = re.compile(r"^# (check\.\w+\(\w+\))$", re.MULTILINE)


def tool(name: str) -> ModuleType:
    """A script of the book, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", ()))


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def test_the_book_has_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_every_page_is_in_the_table_of_contents_and_there():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    listed = [contents["root"], *(chapter["file"] for part in contents["parts"] for chapter in part["chapters"])]
    there = {f"book/{path.stem}" for path in (ROOT / "book").iterdir() if path.suffix in (".md", ".ipynb")}
    assert sorted(listed) == sorted(there)


def test_the_api_page_shows_every_module_but_the_command_line_once():
    shown = re.findall(r"^\.\. automodule:: (\S+)$", (ROOT / "book" / "api.md").read_text("utf-8"), re.MULTILINE)
    files = [path.relative_to(ROOT) for path in (ROOT / "dager_tutorial").rglob("*.py")]
    there = [".".join(path.with_suffix("").parts) for path in files if path.name != "__init__.py"]
    assert sorted(shown) == sorted(name for name in there if not name.startswith("dager_tutorial.cli."))


def chapters_and_files(page: str) -> list[tuple[str, str]]:
    """The rows of a page's table of chapters and the files that they explain."""
    rows = re.findall(r"^\| (.+?) \| (`[\w./]+`.*) \|$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    return [(chapter.replace("](book/", "]("), files) for chapter, files in rows]


def test_readers_and_contributors_see_the_same_table_of_files():
    """That it names every file is tested where contributors read it."""
    table = chapters_and_files("book/api.md")
    assert table == chapters_and_files("CONTRIBUTING.md")
    assert len(table) == len(CHAPTERS) + 1  # the last row holds what no chapter explains


@notebooks
def test_a_notebook_was_run_whole_and_in_order(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        outputs = [output for output in cell.outputs if output.output_type == "stream"]
        assert all(output.name == "stdout" for output in outputs), f"writes to standard error: {cell.source[:60]}"
        assert not any("UsageError" in output.text for output in outputs)
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in tags(cell))


@notebooks
def test_a_notebook_has_the_form_that_refresh_gives_it(path):
    assert tool("notebooks").dumped(tool("notebooks").normalise(read(path))) == path.read_text("utf-8")
    assert path.stat().st_size < LARGEST_FILE


@notebooks
def test_cells_are_small_and_tags_are_known(path):
    for cell in read(path).cells:
        assert tags(cell) <= TAGS
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert len(lines) <= LONGEST_CELL, f"{len(lines)} lines: {lines[0]}"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted((ROOT / "book").glob("*.md"))], ids=lambda path: path.stem)
def test_terms_are_spelled_in_one_way(path):
    text = prose(path) if path.suffix == ".ipynb" else path.read_text("utf-8")
    text = re.sub(r"`[^`]*`|\$[^$]*\$|```.*?```", "", text, flags=re.DOTALL).lower()
    assert {wrong: right for wrong, right in SPELLED.items() if wrong in text} == {}


@notebooks
def test_a_figure_has_caption_name_and_description(path):
    for cell in code_cells(path):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            described = cell.metadata.get("mystnb", {})
            assert len(described.get("image", {}).get("alt", "")) > 40, cell.source[:60]
            figure = described.get("figure", {})
            assert figure.get("name", "").startswith("fig-") and figure.get("caption"), cell.source[:60]
            assert f"{{numref}}`{figure['name']}`" in prose(path), f"no text speaks of {figure['name']}"


@chapters
def test_a_chapter_follows_the_recipe(path):
    text = prose(path)
    for part in (*PARTS, *SECTIONS):
        assert part in text, part
    assert any("assert " in cell.source for cell in code_cells(path))
    assert 3 <= text.partition("**After this chapter you can**")[2].partition("**Before")[0].count("\n- ") <= 5
    assert len([cell for cell in read(path).cells if "slide" in tags(cell)]) >= 5


@pytest.mark.parametrize("path", CHAPTERS[1:6], ids=lambda path: path.stem)
def test_a_chapter_has_something_to_move(path):
    assert any(re.search(r"^explore\($", cell.source, re.MULTILINE) for cell in code_cells(path))
    drawn = [output.get("data", {}).get("text/html", "") for cell in code_cells(path) for output in cell.outputs]
    assert any('class="dager-explore"' in page and 'type="range"' in page for page in drawn)


def exercises() -> list[Any]:
    """Name, notebook, index of the stub's cell and of the solution's."""
    found = []
    for path in CHAPTERS:
        cells = code_cells(path)
        stubs = [index for index, cell in enumerate(cells) if "exercise" in tags(cell)]
        solutions = [index for index, cell in enumerate(cells) if "solution" in tags(cell)]
        for number, pair in enumerate(zip(stubs, solutions, strict=True), start=1):
            found.append(pytest.param(path, *pair, id=f"{path.stem}-{number}"))
    return found


def run(path: Path, cells: list[str]) -> None:
    """Run sources one after the other, after the imports of the notebook."""
    imports = [line for cell in code_cells(path) for line in cell.source.splitlines()]
    imports = [line for line in imports if re.match(r"(import|from) ", line) and "google" not in line]
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for source in ["\n".join(imports), *cells]:
            exec(compile(source, path.name, "exec"), names)


@chapters
def test_a_chapter_has_exercises(path):
    assert 2 <= prose(path).count("### Exercise ") == prose(path).count("<summary>Hint</summary>") <= 4


@pytest.mark.parametrize(("path", "stub", "solution"), exercises())
def test_a_check_fails_on_the_stub_and_passes_on_the_solution(path, stub, solution):
    cells = code_cells(path)
    asked, solved = cells[stub].source, cells[solution].source
    calls = CHECK.findall(asked)
    assert len(calls) == 1, "the exercise ends with its check as a comment: # check.name(name)"
    assert solved.rstrip().endswith(calls[0])
    run(path, [solved])
    with pytest.raises(AssertionError, match="put your code"):
        run(path, [asked, calls[0]])


@pytest.mark.parametrize(("counts", "expected"), [case[:2] for case in STATUSES if case[0].texts])
def test_exercise_7_3_asks_for_the_verdicts_of_the_package(counts: Counts, expected: str):
    ends = Ends(counts.ends is not None, counts.ends or 0, counts.texts, counts.promised_ends)
    assert of_prefixes(counts.prefixes, counts.promised, ends, late=False)[0] == expected


def test_the_repository_is_named_in_one_place():
    url = tool("notebooks").repository_url()
    others = [path for path in ROOT.glob("*.*") if path.suffix in (".toml", ".cff", ".txt", ".yml")]
    holders = [path.name for path in [*others, *(ROOT / "book").glob("*.md")] if url in path.read_text("utf-8")]
    assert holders == ["_config.yml"]
    assert all(url in code_cells(path)[0].source for path in NOTEBOOKS)


@chapters
def test_a_handout_has_every_exercise_and_no_solution(path):
    handout = nbformat.reads(tool("notebooks").handout_of(path), as_version=4)
    kept = [cell for cell in handout.cells if cell.cell_type == "code"]
    assert len(kept) == len([cell for cell in code_cells(path) if "solution" not in tags(cell)])
    assert any("exercise" in tags(cell) for cell in kept)
    assert not any(cell.outputs for cell in kept)


@notebooks
def test_a_draft_becomes_the_same_notebook(path):
    """What a chapter is edited as loses nothing but outputs."""
    tools = tool("notebooks")
    again = tools.normalise(tools.jupytext.reads(tools.draft_of(path), fmt="md:myst"))
    first = read(path)
    assert [(cell.id, cell.source, cell.metadata) for cell in again.cells] == [
        (cell.id, cell.source, cell.metadata) for cell in first.cells
    ]
