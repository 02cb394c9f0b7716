"""The audit's page in a browser: nobody is asked for anything, it fits its window, and it prints.

`make pages` runs these tests, and nothing else does.
"""

from __future__ import annotations

import io
import os

import pytest
from helpers import WORDS
from test_pages import browser  # noqa: F401 (a fixture)

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.evaluation.changes import usual_changes
from dager_tutorial.evaluation.ladder import climb
from dager_tutorial.report.facts import About, gather, with_ladder
from dager_tutorial.report.page import page
from dager_tutorial.report.sent import Source
from dager_tutorial.server.attack import attack

pytestmark = pytest.mark.skipif("DAGER_PAGES" not in os.environ, reason="needs a browser: run `make pages`")

LONG = "A-name-without-any-place-to-break-it-" * 6


@pytest.fixture(scope="module", params=[False, True], ids=["hidden", "shown"])
def written(request, tiny_gpt2, tmp_path_factory):
    """The page of a small update, with long names, as a file."""
    texts = [" ".join(WORDS[start : start + 14]) for start in (10, 200)]
    update, truth = play(tiny_gpt2, texts, config=ClientConfig(share="all"))
    found, about = attack(tiny_gpt2, update), About(f"dager audit {LONG}", "today", {LONG: LONG}, live=False)
    facts = gather(
        tiny_gpt2,
        update,
        found,
        source=Source(LONG, 1, "0" * 64),
        about=about,
        truth=truth,
        show_texts=request.param,
    )
    rungs = climb(tiny_gpt2, update, truth, changes=usual_changes(tiny_gpt2, update))
    path = tmp_path_factory.mktemp("audit") / "audit.html"
    path.write_text(page(with_ladder(facts, tuple(rungs))), "utf-8")
    return path, facts.headline.sentence


@pytest.fixture
def tab(browser):  # noqa: F811
    """A tab that records what the page complains of and what it asks for."""
    opened = browser.new_page()
    opened.complaints, opened.asked = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_fits_its_window(tab, written, width, scheme):
    path, sentence = written
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(path.as_uri(), wait_until="networkidle")
    for summary in tab.locator("summary").all():
        summary.click()
    assert tab.complaints == [] and tab.asked == [path.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert sentence in tab.locator(".verdict").inner_text()
    for picture in tab.locator("svg").all():
        assert len(picture.get_attribute("aria-label")) > 20
        box = picture.bounding_box()
        assert box["width"] > 200 and box["x"] + box["width"] <= width
    outside = """svg => [...svg.querySelectorAll("text")].filter(text => {
      const [a, b] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
      return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
    }).map(text => text.textContent)"""
    assert [found for svg in tab.locator("svg").all() for found in svg.evaluate(outside)] == []


def test_the_page_prints(tab, written):
    pypdf = pytest.importorskip("pypdf")
    path, sentence = written
    tab.goto(path.as_uri())
    printed = pypdf.PdfReader(io.BytesIO(tab.pdf(prefer_css_page_size=True, print_background=False)))
    said = "".join("".join(page.extract_text().split()) for page in printed.pages)
    assert "".join(sentence.split()) in said and 2 <= len(printed.pages) <= 8
