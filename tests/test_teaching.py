"""What the page for lecturers says of the decks is what is in them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).parent.parent / "book"
PAGE = (BOOK / "teaching.md").read_text("utf-8")
CHAPTERS = sorted(path for path in BOOK.glob("*.ipynb") if path.stem[:2].isdigit())


def minutes(path: Path) -> int:
    """The minutes that the speaker's notes of a chapter's slides add up to."""
    cells = nbformat.read(path, as_version=4).cells
    shown = [cell for cell in cells if {"slide", "slide-more"} & set(cell.metadata.get("tags", ()))]
    notes = (re.match(r"(\d+) min", cell.metadata.get("notes", "")) for cell in shown)
    return sum(int(found[1]) for found in notes if found)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_minutes_of_a_lecture_add_up(path: Path) -> None:
    row = re.search(rf"^\| \[[^]]+\]\({path.name}\) \| (\d+) minutes \| (\d+) minutes \|", PAGE, re.MULTILINE)
    assert row is not None
    assert int(row[1]) == minutes(path) <= 80
    assert int(row[2]) > int(row[1])


def test_the_course_has_twelve_sessions_and_reads_every_chapter() -> None:
    course = PAGE.partition("## A course of twelve sessions")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\d+) \|", course, re.MULTILINE) == [str(number) for number in range(1, 13)]
    assert set(re.findall(r"\((\w+\.ipynb)\)", course)) == {path.name for path in CHAPTERS}
    guest = PAGE.partition("## A guest lecture of two hours")[2].partition("\n## ")[0]
    assert sum(map(int, re.findall(r"^\d\. \*(\d+) minutes", guest, re.MULTILINE))) == 120


def test_the_parts_of_an_exam_answer_add_up() -> None:
    """The points in brackets within each question are those of the question, where the answer is no open one."""
    questions = re.split(
        r"^\d\. \*\*", PAGE.partition("## Exam questions")[2].partition("\n## ")[0], flags=re.MULTILINE
    )
    assert len(questions) > 6
    for question in questions[1:]:
        points, *parts = (int(number) for number in re.findall(r"\[(\d+)(?:, open)?\]", question))
        assert sum(parts) == points, question[:60]
