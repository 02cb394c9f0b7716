"""Print the built book into one PDF: a cover, a table of contents with page numbers, every page, and bookmarks.

    python book/_tools/pdf.py        writes _build/html/what-a-gradient-gives-away.pdf

Each page of the site is printed by a headless Chromium, with everything unfolded that is folded on the screen, and the
parts are joined. The order is that of `_toc.yml`; the reference of the package (the API page) stays on the site.
"""

from __future__ import annotations

import functools
import html
import io
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from playwright.sync_api import sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
TARGET = SITE / "what-a-gradient-gives-away.pdf"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LEFT_OUT = ("book/api",)
PAPER = {"format": "A4", "scale": 0.9, "margin": {"top": "17mm", "bottom": "18mm", "left": "17mm", "right": "17mm"}}
FOOTER = '<div style="font: 8px sans-serif; width: 100%; text-align: center; color: #555">{}</div>'
UNFOLD = """() => {
  document.documentElement.dataset.theme = "light";
  document.querySelectorAll("details").forEach(part => part.open = true);
  document.querySelectorAll("img[loading=lazy]").forEach(image => image.loading = "eager");
  return [...document.querySelectorAll("article h1, article h2")].map(heading => {
    const copy = heading.cloneNode(true);
    copy.querySelectorAll(".headerlink").forEach(link => link.remove());
    return [heading.tagName, copy.textContent.trim()];
  });
}"""
STYLE = """
  body { font-family: "DejaVu Sans", sans-serif; color: #111; }
  .cover { height: 240mm; display: flex; flex-direction: column; justify-content: center; text-align: center; }
  .cover h1 { font-size: 34pt; } .cover p { font-size: 13pt; }
  table { width: 100%; border-collapse: collapse; font-size: 10.5pt; } td { padding: 1.2mm 0; }
  td:last-child { text-align: right; } tr.part td { font-weight: bold; padding-top: 5mm; }
  tr.section td { font-size: 9pt; color: #444; } tr.section td:first-child { padding-left: 7mm; }
"""


@dataclass
class Part:
    """A page of the book on paper.

    Attributes:
        name: Its file, without the ending.
        caption: The part of the book that it opens, or nothing.
        title: Its title, with its number.
        sections: Titles of its sections.
        paper: What Chromium printed.
    """

    name: str
    caption: str
    title: str
    sections: list[str]
    paper: PdfReader

    @property
    def starts(self) -> list[int]:
        """For each section the page of this part on which its title stands, counted from 0."""
        texts = ["".join((page.extract_text() or "").split()) for page in self.paper.pages]
        found, last = [], 0
        for section in self.sections:
            wanted = "".join(section.split())
            last = next((number for number in range(last, len(texts)) if wanted in texts[number]), last)
            found.append(last)
        return found


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site and prints nothing."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def served() -> Iterator[str]:
    """The address of the site while it is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def pages() -> list[tuple[str, str]]:
    """Caption of the part that begins, or nothing, and the name of each page, in the order of the contents."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    listed = [("", contents["root"])]
    for part in contents["parts"]:
        names = [chapter["file"] for chapter in part["chapters"] if chapter["file"] not in LEFT_OUT]
        listed += [(part["caption"] if index == 0 else "", name) for index, name in enumerate(names)]
    return listed


def printed(tab: Any, address: str, name: str, caption: str) -> Part:
    """One page of the site on paper."""
    tab.goto(f"{address}{name}.html", wait_until="networkidle")
    if tab.locator(".math").count():
        tab.wait_for_selector("mjx-container", state="attached")
        tab.evaluate("MathJax.startup.promise")
    (_, title), *others = tab.evaluate(UNFOLD)
    footer = FOOTER.format(html.escape(title))
    paper = tab.pdf(
        **PAPER, print_background=True, display_header_footer=True, header_template="<i></i>", footer_template=footer
    )
    sections = [text for kind, text in others if kind == "H2"]
    return Part(name, caption, title, sections if name[5:7].isdigit() else [], PdfReader(io.BytesIO(paper)))


def front(tab: Any, parts: list[Part], before: int) -> PdfReader:
    """The cover and the contents; `before` pages stand before the first part."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    rows, page = [], before + 1
    for part in parts:
        rows += [f'<tr class="part"><td>{html.escape(part.caption)}</td><td></td></tr>'] if part.caption else []
        rows.append(f"<tr><td>{html.escape(part.title)}</td><td>{page}</td></tr>")
        for section, start in zip(part.sections, part.starts, strict=True):
            rows.append(f'<tr class="section"><td>{html.escape(section)}</td><td>{page + start}</td></tr>')
        page += len(part.paper.pages)
    tab.set_content(
        f"<style>{STYLE}</style><div class='cover'><h1>{html.escape(config['title'])}</h1>"
        f"<p>{html.escape(config['author'])}</p></div>"
        f"<h1 style='break-before: page'>Contents</h1><table>{''.join(rows)}</table>"
    )
    return PdfReader(io.BytesIO(tab.pdf(**PAPER)))


def joined(opening: PdfReader, parts: list[Part]) -> PdfWriter:
    """All pages in one file, with numbers at the foot and bookmarks."""
    writer = PdfWriter()
    writer.append(opening, import_outline=False)
    writer.add_outline_item(title="Contents", page_number=1)
    for part in parts:
        first = len(writer.pages)
        writer.append(part.paper, import_outline=False)
        mark = writer.add_outline_item(title=part.title, page_number=first, bold=True)
        for section, start in zip(part.sections, part.starts, strict=True):
            writer.add_outline_item(title=section, page_number=first + start, parent=mark)
    return writer


def relink(writer: PdfWriter, address: str, starts: dict[str, int]) -> None:
    """Links to other pages of the site lead to their place on paper; those to what is not printed are none."""
    for page in writer.pages:
        kept = ArrayObject()
        for reference in page.get("/Annots", ()):
            link = reference.get_object()
            target = str(link.get("/A", {}).get("/URI", ""))
            if target.startswith(address):
                name = urlsplit(target).path.lstrip("/").removesuffix(".html")
                if name not in starts:
                    continue
                del link["/A"]
                place = writer.pages[starts[name]].indirect_reference
                link[NameObject("/Dest")] = ArrayObject([place, NameObject("/Fit")])
            kept.append(reference)
        page[NameObject("/Annots")] = kept


def number(tab: Any, writer: PdfWriter) -> None:
    """Put a number at the foot of each page but the cover."""
    sheets = "".join(
        f'<div style="break-after: page; height: 296mm; position: relative">'
        f'<span style="position: absolute; right: 17mm; bottom: 8mm; font: 9px sans-serif">{page or ""}</span></div>'
        for page in [0, *range(2, len(writer.pages) + 1)]
    )
    tab.set_content(f"<style>html, body {{ margin: 0 }}</style>{sheets}")
    stamps = PdfReader(io.BytesIO(tab.pdf(format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "0"))))
    for page, stamp in zip(writer.pages, stamps.pages, strict=False):
        page.merge_page(stamp)


def main() -> None:
    """Write the PDF beside the pages."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"make pdf: no browser to print with: install one of {', '.join(BROWSERS)}")
    if not (SITE / "book").is_dir():
        sys.exit("make pdf: the book is not built: run `make book` first")
    with served() as address, sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page(viewport={"width": 1000, "height": 1200})
        parts = [printed(tab, address, name, caption) for caption, name in pages()]
        before = len(front(tab, parts, 0).pages)  # the length of the contents does not hang on the numbers in them
        writer = joined(front(tab, parts, before), parts)
        lengths = [before, *(len(part.paper.pages) for part in parts)]
        relink(writer, address, dict(zip((part.name for part in parts), accumulate(lengths), strict=False)))
        number(tab, writer)
        chromium.close()
    writer.add_metadata({"/Title": yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["title"]})
    writer.compress_identical_objects()
    writer.write(TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {len(writer.pages)} pages, {TARGET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
