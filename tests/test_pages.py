"""The built book in a browser: every page loads, sets its formulas, moves its sliders, and asks nobody for anything.

These tests look at what `make book` and `make slides` made, so `make pages` runs them, and nothing else does.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import threading
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_build" / "html"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
SHOWN = [page for page in PAGES if not page.startswith("_modules/dager_tutorial/")]  # listings are all alike
CHAPTERS = [page for page in PAGES if page.startswith("book/")]
DECKS = [page for page in PAGES if page.startswith("slides/")]

pytestmark = pytest.mark.skipif("DAGER_PAGES" not in os.environ, reason="looks at the built book: run `make pages`")


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site and prints nothing."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not CHAPTERS:
        pytest.fail("the book is not built: run `make book`")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no browser: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """A fresh tab that records what the page complains of and whom it asks; others than the site get no answer."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.complaints, page.strangers = [], []

    def answer(route: Any) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            page.strangers.append(route.request.url)
            route.abort()

    page.route("**/*", answer)
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("response", lambda got: page.complaints.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    yield page
    page.close()


@pytest.mark.parametrize("name", SHOWN or [None])
def test_a_page_loads_alone_and_without_complaint(tab, address, name):
    tab.goto(address + name, wait_until="networkidle")
    assert tab.strangers == []
    assert tab.complaints == []


@pytest.mark.parametrize("name", CHAPTERS or [None])
def test_formulas_are_set(tab, address, name):
    tab.goto(address + name, wait_until="networkidle")
    sources, errors = tab.locator(".math").count(), tab.locator("mjx-merror").count()
    assert errors == 0
    if sources:
        tab.wait_for_selector("mjx-container", state="attached", timeout=10_000)
        assert tab.locator("mjx-container").count() >= sources
        assert not any("\\(" in text or "\\[" in text for text in tab.locator(".math").all_inner_texts())


@pytest.mark.parametrize("name", CHAPTERS or [None])
def test_every_slider_moves_its_picture(tab, address, name):
    tab.goto(address + name, wait_until="networkidle")
    for box in tab.locator(".dager-explore").all():
        picture = box.locator("img")
        sliders = box.locator("input[type=range]").all()
        for slider in sliders:
            for other in sliders:  # at the first setting of the others a slider need not change the picture
                other.press("Home" if other == slider else "End")
            before, described = picture.get_attribute("src"), picture.get_attribute("alt")
            label = slider.locator("xpath=following-sibling::output").inner_text()
            assert slider.get_attribute("aria-valuetext") == label
            slider.focus()
            slider.press("End")
            assert picture.get_attribute("src") != before
            assert picture.get_attribute("alt") != described
            assert picture.get_attribute("alt").endswith(box.locator("[aria-live=polite]").text_content())
            assert slider.locator("xpath=following-sibling::output").inner_text() != label
            assert slider.get_attribute("aria-valuetext") != label
            slider.press("Home")
            assert picture.get_attribute("src") == before
        assert picture.evaluate("image => image.naturalWidth") > 200


@pytest.mark.parametrize("name", CHAPTERS or [None])
def test_pictures_say_what_they_show(tab, address, name):
    tab.goto(address + name, wait_until="networkidle")
    for picture in tab.locator("article img").all():
        assert len(picture.get_attribute("alt") or "") > 20, picture.get_attribute("src")[:80]
        assert picture.evaluate("image => image.complete && image.naturalWidth > 0")


@pytest.mark.parametrize("name", CHAPTERS or [None])
def test_code_is_seen_without_scrolling_sideways(tab, address, name):
    tab.set_viewport_size({"width": 1200, "height": 900})
    tab.goto(address + name, wait_until="networkidle")
    for code in tab.locator(".cell_input pre:visible").all():
        wide, room = code.evaluate("pre => [pre.scrollWidth, pre.clientWidth]")
        assert wide <= room, code.inner_text()


NARROW = """() => [...document.querySelectorAll("div.math")].filter(formula => {
  const number = formula.querySelector(".eqno"), set = formula.querySelector("mjx-container");
  if (!number || !set || !number.getClientRects().length) return false;
  const [a, b] = [number.getBoundingClientRect(), set.getBoundingClientRect()];
  return b.right > innerWidth || !(a.left >= b.right - 1 || a.top >= b.bottom - 1);
}).map(formula => formula.id)"""


@pytest.mark.parametrize("name", CHAPTERS or [None])
def test_a_page_fits_a_narrow_screen(tab, address, name):
    """Formulas, code and figures that are wider scroll in boxes of their own; a formula's number is not upon it."""
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.goto(address + name, wait_until="networkidle")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate(NARROW) == []


# What of the slide that is shown does not fit into it, and its sentences: text outside headings, code and tables.
LOOK = """() => {
  const slide = Reveal.getCurrentSlide(), room = document.querySelector(".slides").getBoundingClientRect();
  const name = thing => thing.tagName.toLowerCase() + " " + (thing.alt || thing.textContent).trim().slice(0, 60);
  const seen = [...slide.querySelectorAll("h2, p, li, pre, img, table, .box, mjx-container, .dager-explore")].filter(
    thing => !thing.closest("aside") && thing.getClientRects().length && !thing.matches(".said"));
  const outside = seen.filter(thing => {
    const box = thing.getBoundingClientRect();
    return box.right > room.right + 3 || box.bottom > room.bottom + 3 || box.left < room.left - 3;
  });
  const boxes = seen.filter(thing => thing.matches("pre, .dager-explore, .box"));
  const cut = boxes.filter(box => box.scrollWidth > box.clientWidth + 3);
  const small = seen.filter(thing => thing.matches("img") && thing.getBoundingClientRect().height < 0.35 * room.height);
  const words = [...slide.querySelectorAll("p, li")].filter(
    thing => !thing.closest("aside, pre, .answer, .said, .box-title")).map(thing => thing.innerText);
  return {wrong: [...new Set([...outside, ...cut, ...small])].map(name), words: words.join(" "), title: name(slide)};
}"""


@pytest.mark.parametrize("name", DECKS or [None])
def test_slides_fit_say_a_sentence_and_show_formulas(tab, address, name):
    tab.set_viewport_size({"width": 1280, "height": 720})
    tab.goto(address + name, wait_until="networkidle")
    tab.wait_for_function("window.Reveal && Reveal.isReady()")
    total = tab.evaluate("Reveal.getTotalSlides()")
    assert total > 3
    faults = []
    for number in range(1, total):
        tab.evaluate(f"Reveal.slide({number})")
        tab.evaluate("while (Reveal.availableFragments().next) Reveal.nextFragment()")
        seen = tab.evaluate(LOOK)
        faults += [f"slide {number + 1} is left by: {thing}" for thing in seen["wrong"]]
        if len(seen["words"].split()) < 6:
            faults.append(f"slide {number + 1} has no sentence: {seen['title']}")
    assert faults == []
    assert tab.locator("mjx-merror").count() == 0
    said = tab.locator(".slides").evaluate(
        "deck => [...deck.querySelectorAll('script, style, pre')].forEach(one => one.remove()) || deck.textContent"
    )
    assert [sign for sign in ("`", ":::", "{prf", "{ref}", "details", "$$") if sign in said] == []


@pytest.mark.parametrize("name", DECKS or [None])
def test_slides_number_things_as_the_page_does(tab, address, name):
    tab.goto(address + name.replace("slides/", "book/"), wait_until="networkidle")
    page = {text.strip() for text in tab.locator(".caption-number").all_inner_texts()}
    tab.goto(address + name, wait_until="networkidle")
    titles = tab.locator(".box-title, .caption b").evaluate_all("all => all.map(one => one.textContent)")
    numbers = {found[0] for title in titles if (found := re.match(r"[A-Z][a-z]+\.? \d+\.\d+", title))}
    assert numbers <= page


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag in ("a", "img", "script", "link") and (target := values.get("href") or values.get("src")):
            self.targets.append(target)


def test_internal_links_lead_somewhere(address):
    found = {}
    for name in PAGES:
        found[name] = Links()
        found[name].feed((SITE / name).read_text("utf-8"))
    broken = []
    for name, links in found.items():
        for target in links.targets:
            parts = urlsplit(urljoin(f"http://site/{name}", target))
            if parts.netloc != "site" or parts.scheme != "http":
                continue
            path = unquote(parts.path).lstrip("/") or "index.html"
            known = found[path].anchors if path in found else None
            if not (SITE / path).is_file() or (parts.fragment and known and unquote(parts.fragment) not in known):
                broken.append(f"{name} -> {target}")
    assert broken == []


def test_the_widget_library_works_offline(tab, address):
    """A notebook that stores the state of its own ipywidgets shows them without a network, too."""
    controls = {"model_module": "@jupyter-widgets/controls", "model_module_version": "2.0.0"}
    base = {"model_module": "@jupyter-widgets/base", "model_module_version": "2.0.0"}
    slider = {**controls, "model_name": "IntSliderModel", "state": {"value": 3, "layout": "IPY_MODEL_b"}}
    version = {"version_major": 2, "version_minor": 0}
    state = {**version, "state": {"a": slider, "b": {**base, "model_name": "LayoutModel", "state": {}}}}
    tab.goto(address + CHAPTERS[0], wait_until="networkidle")
    for kind, content in (("state", state), ("view", {**version, "model_id": "a"})):
        tab.evaluate(
            """([type, text]) => document.body.appendChild(Object.assign(
                document.createElement("script"), {type: type, textContent: text}))""",
            [f"application/vnd.jupyter.widget-{kind}+json", json.dumps(content)],
        )
    for script in ("require.js", "embed-amd.js"):
        tab.add_script_tag(url=f"{address}widgets/{script}")
    tab.evaluate("window.dispatchEvent(new Event('load'))")
    tab.wait_for_selector(".widget-slider", timeout=10_000)
    assert tab.strangers == []


def test_the_printed_book_has_every_page_and_a_mark_for_each():
    pypdf = pytest.importorskip("pypdf")
    book = pypdf.PdfReader(SITE / "what-a-gradient-gives-away.pdf")
    marks = [mark for mark in book.outline if not isinstance(mark, list)]
    starts = [book.get_destination_page_number(mark) for mark in marks]
    assert starts == sorted(starts)
    for mark, start in zip(marks, starts, strict=True):
        printed = unicodedata.normalize("NFKC", book.pages[start].extract_text())  # some fonts join f and i
        title, page = re.sub(r"[\d.\s]", "", mark.title), re.sub(r"[\d.\s]", "", printed)
        assert title in page, f"{mark.title} is not on page {start + 1}"
    notes = [note.get_object() for page in book.pages for note in page.get("/Annots", ())]
    assert [note for note in notes if "127.0.0.1" in str(note.get("/A", ""))] == []
    assert any("/Dest" in note for note in notes)
    written = {re.sub(r"^[\d. ]+", "", mark.title) for mark in marks}
    for path in sorted((ROOT / "book").glob("[0-9]*.ipynb")):
        title = json.loads(path.read_text("utf-8"))["cells"][0]["source"]
        assert "".join(title).splitlines()[0].removeprefix("# ") in written
