"""The notebooks as files: what nbval does not look at, the shape of a chapter, and its exercises.

nbval (strict, over every notebook, in the same pytest run) executes the cells and compares what they print. It passes
a cell without an execution count, an unknown magic and a notebook that was never run; the tests here do not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml

from dager_tutorial.checks.whole_attack import STATUSES, Counts
from dager_tutorial.server.outcome import Ends
from dager_tutorial.server.verdict import of_prefixes

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
EXAMPLES = sorted((ROOT / "examples").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]
LESSONS = [path for path in CHAPTERS if path.stem != "16_sealed_envelopes"]  # the last chapter is one large exercise
PAGES = [*NOTEBOOKS, *sorted((ROOT / "book").glob("*.md"))]
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
SECTIONS = ("## What defends", "## Quiz", "## Exercises", "## Recap")
LONGEST_CELL, LONGEST_LINE, LARGEST_FILE = 30, 78, 1_500_000
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


def text_cells(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def section(path: Path, heading: str) -> str:
    """What stands below a heading of the second level."""
    return re.split(r"^## ", prose(path).partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def said_on(path: Path) -> str:
    """All that a page says outside code: text, captions, what the speaker says."""
    if path.suffix == ".md":
        return path.read_text("utf-8")
    spoken = [cell.metadata.get("notes", "") for cell in read(path).cells]
    figures = [cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "") for cell in read(path).cells]
    return "\n\n".join([prose(path), *spoken, *figures])


def words_only(text: str) -> str:
    """A page's text without code and formulas."""
    return re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", "", text, flags=re.DOTALL)


notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
all_notebooks = pytest.mark.parametrize("path", [*NOTEBOOKS, *EXAMPLES], ids=lambda path: path.stem)
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
pages = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


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


@all_notebooks
def test_a_notebook_was_run_whole_and_in_order(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        outputs = [output for output in cell.outputs if output.output_type == "stream"]
        assert all(output.name == "stdout" for output in outputs), f"writes to standard error: {cell.source[:60]}"
        assert not any("UsageError" in output.text for output in outputs)
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in tags(cell))


@all_notebooks
def test_a_notebook_has_the_form_that_refresh_gives_it(path):
    assert tool("notebooks").dumped(tool("notebooks").normalise(read(path))) == path.read_text("utf-8")
    assert path.stat().st_size < LARGEST_FILE


@all_notebooks
def test_cells_are_small_and_tags_are_known(path):
    for cell in read(path).cells:
        assert tags(cell) <= TAGS
        if cell.cell_type == "code" and "colab" not in tags(cell):
            lines = cell.source.splitlines()
            assert len(lines) <= LONGEST_CELL, f"{len(lines)} lines: {lines[0]}"
            assert [line for line in lines if len(line) > LONGEST_LINE] == [], "the page would scroll sideways"


@all_notebooks
def test_what_is_printed_fits_the_page(path):
    printed = [output.text for cell in code_cells(path) for output in cell.outputs if output.output_type == "stream"]
    assert [line for text in printed for line in text.splitlines() if len(line) > LONGEST_LINE] == []


@lessons
def test_imports_stand_in_one_cell_asserts_and_drawings_are_folded(path):
    first, *others = [cell for cell in code_cells(path) if "colab" not in tags(cell)]
    assert re.search(r"^(import|from) ", first.source, re.MULTILINE)
    for cell in others:
        assert not re.search(r"^(import|from) ", cell.source, re.MULTILINE), cell.source[:60]
        if not tags(cell) & {"exercise", "solution", "hide-cell", "remove-cell"}:
            assert not re.search(r"^\s*assert ", cell.source, re.MULTILINE), f"fold it: {cell.source[:60]}"
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                assert tags(cell) & {"hide-input", "remove-input"}, f"fold it: {cell.source[:60]}"


@pages
def test_terms_are_spelled_in_one_way(path):
    text = words_only(said_on(path)).lower()
    assert {wrong: right for wrong, right in SPELLED.items() if wrong in text} == {}


@pages
def test_no_number_of_a_chapter_is_typed(path):
    """Sphinx numbers chapters, exercises, figures and theorems: a link says where, and its text the title."""
    typed = r"\b(?:chapters?|exercises?|figures?|fig\.)\s+\d[\d.]*(?! of )|\bdeck \d"
    assert re.findall(typed, words_only(said_on(path)), re.IGNORECASE) == []


LABELS = {  # by the role that refers to them
    "eq": re.compile(r"^\s*\$\$ *\(([\w-]+)\)$|^:::?`*\{math\}\s*\n:label: (\S+)$", re.MULTILINE),
    "numref": re.compile(r"(?!)"),  # figures are named in the metadata of their cells
    "prf:ref": re.compile(r"^ *:::+\{prf:\w+\}[^\n]*\n *:label: (\S+)$", re.MULTILINE),
    "ref": re.compile(r"^ *:::+\{exercise\}[^\n]*\n *:label: (\S+)$|^\(([\w-]+)\)=$", re.MULTILINE),
}


def labels_of(path: Path) -> Iterator[tuple[str, str]]:
    """Role and name of every place of a page that can be referred to."""
    text = prose(path) if path.suffix == ".ipynb" else path.read_text("utf-8")
    for role, label in LABELS.items():
        yield from ((role, next(filter(None, match.groups()))) for match in label.finditer(text))
    for cell in read(path).cells if path.suffix == ".ipynb" else ():
        if name := cell.metadata.get("mystnb", {}).get("figure", {}).get("name"):
            yield "numref", name


def test_labels_are_unique_and_references_lead_to_them():
    counts = Counter(label for path in PAGES for label in labels_of(path))
    assert [label for label, count in counts.items() if count > 1] == []
    for path in PAGES:
        text = re.sub(r"(`{2,}).*?\1", "", said_on(path), flags=re.DOTALL)  # about the syntax, not a use of it
        for role, target in re.findall(r"\{(eq|numref|prf:ref|ref)\}`(?:[^`<]*<)?([^`>]+)>?`", text):
            found = (role, target) in counts or (role == "numref" and ("ref", target) in counts)
            assert found, f"{path.name}: {{{role}}}`{target}`"


MACROS = re.compile(
    r"\\(?:text|operatorname\*?|mathrm|begin|end|tag|label|color)\s*\{[^{}]*\}|\\(?:left|right|[bB]ig+[lr]?)\b"
)
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi"
)
GREEK += " omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
INDEX = re.compile(r"[_^]\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?\w+?(?![a-zA-Z])|.)")


def symbols(formula: str) -> set[str]:
    """Letters that stand for something in a formula: Latin ones, Greek ones, calligraphic ones."""
    formula = MACROS.sub(" ", formula)
    script = re.findall(r"\\mathcal\s*\{?\s*(\w)\}?", formula)
    formula = re.sub(r"\\mathcal\s*\{?\s*\w\}?", " ", formula)
    named = {name for name in re.findall(r"\\([a-zA-Z]+)", formula) if name in GREEK.split()}
    return named | set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", formula))) | {f"cal {one}" for one in script}


def test_formulas_use_the_symbols_of_the_notation_page():
    """Of numbered formulas, letters in the line; indices may be any. What the page writes anywhere is known."""
    page = (ROOT / "book" / "notation.md").read_text("utf-8")
    known = set().union(*map(symbols, re.findall(r"\$([^$]+)\$", page)))
    unknown: dict[str, set[str]] = {}
    for path in CHAPTERS:
        for formula, label in re.findall(r"\$\$(.*?)\$\$( *\([\w-]+\))?", prose(path), re.DOTALL):
            for symbol in symbols(INDEX.sub(" ", formula)) - known if label else ():
                unknown.setdefault(symbol, set()).add(path.stem)
    assert unknown == {}


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
    assert [part for part in PARTS if part not in text] == []
    assert any("assert " in cell.source for cell in code_cells(path))
    assert 3 <= text.partition("**After this chapter you can**")[2].partition("**Before")[0].count("\n- ") <= 5
    assert len([cell for cell in read(path).cells if "slide" in tags(cell)]) >= 5


@lessons
def test_a_lesson_ends_with_defences_quiz_exercises_and_recap(path):
    headings = re.findall(r"^## .*$", prose(path), re.MULTILINE)
    assert tuple(headings[-len(SECTIONS) :]) == SECTIONS


ANSWER = re.compile(r'<details class="answer">.*?</details>', re.DOTALL)


@lessons
def test_a_reader_predicts_and_checks_before_reading_on(path):
    """Each question is a box, and its folded answer stands below it in the same cell."""
    asked = {kind: [cell for cell in text_cells(path) if f":class: {kind}" in cell] for kind in ("predict", "question")}
    assert len(asked["predict"]) >= 3 and len(asked["question"]) >= 2
    for cell in [*asked["predict"], *asked["question"]]:
        boxes = re.findall(r"^:::+\{admonition\} .+\n:class: (?:predict|question)$", cell, re.MULTILINE)
        assert len(boxes) <= len(ANSWER.findall(cell)), cell[:80]


@lessons
def test_a_quiz_has_questions_and_folded_answers(path):
    quiz = section(path, "## Quiz")
    questions = re.findall(r"^\**\d+\.", ANSWER.sub("", quiz), re.MULTILINE)
    assert 4 <= len(questions) <= 6
    assert len(questions) == len(ANSWER.findall(quiz))


@notebooks
def test_folded_text_is_written_so_that_it_is_set(path):
    """Markdown in `<details>` is read as such only between blank lines."""
    text = prose(path)
    assert text.count("<details") == text.count("</details>") == text.count("<summary>")
    assert not re.search(r"</summary>(?!\n\s*\n)", text)
    assert not re.search(r"(?<!\n)\n *</details>", text)


@notebooks
def test_a_cell_that_the_page_leaves_out_holds_no_part_of_its_order(path):
    """A slide's own text; a heading or a label in it would be missed on the page, and so would be what follows."""
    for cell in read(path).cells:
        if cell.cell_type == "markdown" and "remove-cell" in tags(cell):
            assert tags(cell) & {"slide", "slide-more"}, cell.source[:60]
            assert not re.search(r"^#|^:label:|^\$\$ *\(", cell.source, re.MULTILINE), cell.source[:60]


def test_the_book_has_something_to_move():
    moving = [
        path for path in CHAPTERS if any(re.search(r"^explore\(", code.source, re.M) for code in code_cells(path))
    ]
    assert len(moving) >= 5
    for path in moving:
        drawn = [output.get("data", {}).get("text/html", "") for code in code_cells(path) for output in code.outputs]
        assert any('class="dager-explore"' in page and 'type="range"' in page for page in drawn)


@lessons
def test_a_deck_lasts_a_lecture(path):
    """Each slide's notes begin with its minutes."""
    notes = [cell.metadata.get("notes", "0 min.") for cell in read(path).cells if "slide" in tags(cell)]
    minutes = [re.match(r"(\d+) min\.", note) for note in notes]
    assert all(minutes), [note for note in notes if not re.match(r"\d+ min\.", note)]
    assert 40 <= sum(int(found[1]) for found in minutes if found) <= 80


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


EFFORT = re.compile(r"^\*\*\d+ minutes · [\w -]+ · [^*]+\*\*", re.MULTILINE)


@chapters
def test_a_chapter_has_exercises(path):
    """At least four, each in its box with minutes and difficulty; some are code, one is paper, one has a rubric."""
    cells = [(index, cell) for index, cell in enumerate(read(path).cells) if ":::{exercise}" in cell.source]
    assert len(cells) >= 4
    for index, cell in cells:
        assert re.search(r"^### Exercise: \S", cell.source, re.MULTILINE), cell.source[:60]
        assert cell.source.count(":::{exercise}") == 1
        assert EFFORT.search(cell.source), f"minutes, difficulty, why it matters: {cell.source[:60]}"
        later = read(path).cells[index + 1 : index + 4]
        solved = ANSWER.search(cell.source) or any(tags(one) & {"exercise"} for one in later)
        solved = solved or any(ANSWER.search(one.source) for one in later)
        assert solved, f"neither a stub nor a folded solution: {cell.source[:60]}"
    coded = [cell for cell in code_cells(path) if "exercise" in tags(cell)]
    assert len(coded) >= 2 and len(coded) < len(cells), "some are code, some are not"
    assert "<summary>Rubric" in prose(path)
    assert prose(path).count("<summary>Hint</summary>") >= len(coded)


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
def test_the_exercise_on_statuses_asks_for_the_verdicts_of_the_package(counts: Counts, expected: str):
    ends = Ends(counts.ends is not None, counts.ends or 0, counts.texts, counts.promised_ends)
    assert of_prefixes(counts.prefixes, counts.promised, ends, late=False)[0] == expected


def test_the_repository_is_named_in_one_place():
    url = tool("notebooks").repository_url()
    others = [path for path in ROOT.glob("*.*") if path.suffix in (".toml", ".cff", ".txt", ".yml")]
    holders = [path.name for path in [*others, *(ROOT / "book").glob("*.md")] if url in path.read_text("utf-8")]
    assert holders == ["_config.yml"]
    assert all(url in code_cells(path)[0].source for path in NOTEBOOKS)


@chapters
def test_a_students_handout_has_every_exercise_and_nothing_that_gives_an_answer_away(path):
    text = tool("notebooks").handout_of(path, "student")
    handout, whole = nbformat.reads(text, as_version=4), read(path)
    assert [cell.source for cell in handout.cells if "exercise" in tags(cell)] == [
        cell.source for cell in whole.cells if "exercise" in tags(cell)
    ]
    assert not any(
        "solution" in tags(cell) or cell.get("outputs") or cell.get("execution_count") for cell in handout.cells
    )
    assert "</details>" not in re.sub(
        r"<details>.*?</details>", "", "\n".join(map(str, handout.cells)), flags=re.DOTALL
    )
    assert not any("notes" in cell.metadata for cell in handout.cells), "the speaker's notes tell answers"
    answers = [answer for cell in text_cells(path) for answer in ANSWER.findall(cell)]
    answers += [cell.source for cell in whole.cells if "solution" in tags(cell)]
    lines = {line.strip() for answer in answers for line in answer.splitlines() if len(line.strip()) > 30}
    asked = [cell.source for cell in whole.cells if "solution" not in tags(cell)]
    elsewhere = {line.strip().removeprefix("# ") for source in asked for line in ANSWER.sub("", source).splitlines()}
    assert [line for line in lines - elsewhere if line in text or line.replace('"', '\\"') in text] == []


@chapters
def test_an_instructors_handout_has_everything_unfolded(path):
    handout, whole = nbformat.reads(tool("notebooks").handout_of(path, "instructor"), as_version=4), read(path)
    assert [cell.source for cell in handout.cells if cell.cell_type == "code"] == [
        cell.source for cell in whole.cells if cell.cell_type == "code"
    ]
    assert not any(cell.metadata.get("jupyter", {}).get("source_hidden") for cell in handout.cells)
    shown = "\n".join(cell.source for cell in handout.cells if cell.cell_type == "markdown")
    assert shown.count('<details class="answer" open>') == len(ANSWER.findall(prose(path)))


@all_notebooks
def test_a_draft_becomes_the_same_notebook(path):
    """What a chapter is edited as loses nothing but outputs."""
    tools = tool("notebooks")
    again = tools.normalise(tools.jupytext.reads(tools.draft_of(path), fmt="md:myst"))
    first = read(path)
    assert [(cell.id, cell.source, cell.metadata) for cell in again.cells] == [
        (cell.id, cell.source, cell.metadata) for cell in first.cells
    ]
