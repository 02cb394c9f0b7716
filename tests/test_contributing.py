"""CONTRIBUTING's drawing of the package and its table of chapters say what is there, and the files say it back."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dager_tutorial"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
ROW = re.compile(
    r"^\| (?:\[(?P<title>[^]]+)\]\(book/(?P<chapter>\d\d_\w+)\.ipynb\)|no chapter yet) \| (?P<files>`.+`) \|$",
    re.MULTILINE,
)
ROWS = [(row["chapter"], row["title"], re.findall(r"`([^`]+)`", row["files"])) for row in ROW.finditer(GUIDE)]
EXPLAINED = ("baselines", "challenges", "client", "evaluation", "frameworks", "models", "server", "textbook")
NAMED = {entry for _, _, entries in ROWS for entry in entries}


def files_of(entry: str) -> set[str]:
    """What an entry of the table stands for: a file, or those of a folder that no other entry names better."""
    if not entry.endswith("/"):
        return {entry}
    inside = {str(path.relative_to(PACKAGE)) for path in (PACKAGE / entry).rglob("*.py")}
    better = {other for other in NAMED if other.startswith(entry) and other != entry}
    return {path for path in inside if not any(path == other or path.startswith(other) for other in better)}


def chapters_named_in(path: Path) -> set[str]:
    """Chapters that the docstring at the top of a file names, by the names of their files."""
    return set(re.findall(r"`(\d\d_\w+)`", ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""))


CHAPTERS_OF = {}
for _chapter, _, _entries in ROWS:
    for _file in set().union(*map(files_of, _entries)):
        CHAPTERS_OF.setdefault(_file, set()).add(_chapter)


def test_the_table_has_every_chapter_of_the_book_in_order():
    notebooks = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
    titles = [json.loads(path.read_text("utf-8"))["cells"][0]["source"] for path in notebooks]
    written = [
        ("".join(title).splitlines()[0].removeprefix("# "), path.stem)
        for title, path in zip(titles, notebooks, strict=True)
    ]
    assert [(title, chapter) for chapter, title, _ in ROWS] == [*written, (None, None)]


def test_docstrings_name_only_chapters_that_are_there():
    named = {name: path for path in PACKAGE.rglob("*.py") for name in chapters_named_in(path)}
    assert {name: path for name, path in named.items() if not (ROOT / "book" / f"{name}.ipynb").exists()} == {}


def test_the_table_names_only_what_is_there():
    assert [entry for entry in NAMED if not (PACKAGE / entry).exists()] == []
    assert [entry for entry in NAMED if (PACKAGE / entry).is_dir() != entry.endswith("/")] == []
    assert [entry for entry in NAMED if not files_of(entry)] == []


def test_the_table_has_a_row_for_every_file():
    present = {str(path.relative_to(PACKAGE)) for room in EXPLAINED for path in (PACKAGE / room).rglob("*.py")}
    assert {path for path in present - set(CHAPTERS_OF) if not path.endswith("__init__.py")} == set()
    assert [path for path, chapters in CHAPTERS_OF.items() if None in chapters and len(chapters) > 1] == []


@pytest.mark.parametrize("path", sorted(path for path, chapters in CHAPTERS_OF.items() if chapters != {None}))
def test_a_file_names_the_chapters_that_explain_it(path):
    assert chapters_named_in(PACKAGE / path) >= CHAPTERS_OF[path]


def test_the_drawing_shows_every_room():
    drawing = re.search(r"^dager_tutorial/\n((?:  .*\n)+)", GUIDE, re.MULTILINE)[1]
    drawn = set(re.findall(r"(?<![\w./])(\w+(?:/|\.py))(?=\s|$)", drawing))
    for folder, ignored in ((PACKAGE, {"__init__.py"}), (PACKAGE / "server", {"__init__.py"})):
        there = {path.name for path in folder.glob("*.py")}
        there |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
        assert there - ignored <= drawn
        drawn -= there
    assert drawn == set()
