"""Make reveal.js slides from the notebooks of the book, by cell tags.

    python book/_tools/slides.py        writes _build/html/slides/<chapter>.html

A cell tagged `slide` is a slide: the text of a markdown cell, the output of a code cell. `slide-more` puts a cell onto
the slide before it, `slide-code` shows a code cell's source, too. The title is the section's heading. A cell's `notes`
(in its metadata) are what the speaker sees. The built book must be there: the slides share its MathJax and reveal.js.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode
from pybtex.database import parse_file
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
HEADING = re.compile(r"^(#{1,3}) +(.+)$", re.MULTILINE)
LABEL = re.compile(r"^\$\$ *\(([\w-]+)\)$", re.MULTILINE)
ROLE = re.compile(r"\{(cite:[pt]|eq|numref|term|doc|ref)\}`([^`]*)`")
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\.(?:md|ipynb)(?:#[^)]*)?\)")
CODE = HtmlFormatter(style="friendly", nowrap=False)


@dataclass
class Slide:
    """One slide.

    Attributes:
        title: The heading of its section.
        parts: Its content as HTML.
        notes: What the speaker sees.
    """

    title: str
    parts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def html(self) -> str:
        """The slide as reveal.js wants it."""
        notes = f'<aside class="notes">{"<br>".join(map(html.escape, self.notes))}</aside>' if self.notes else ""
        return f"<section><h2>{self.title}</h2>{''.join(self.parts)}{notes}</section>"


class Renderer:
    """Turns the cells of one chapter into HTML.

    Args:
        chapter: The chapter's number, 0 for pages without.
        cells: All its cells, from which equations are numbered as in the book.
    """

    def __init__(self, chapter: int, cells: Iterable[NotebookNode]) -> None:
        labels = [label for cell in cells if cell.cell_type == "markdown" for label in LABEL.findall(cell.source)]
        self.equations = {label: f"{chapter}.{number}" for number, label in enumerate(labels, start=1)}
        self.books = parse_file(str(ROOT / "book" / "references.bib")).entries
        self.parser = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=self._math)

    @staticmethod
    def _math(content: str, options: dict[str, bool]) -> str:
        content = html.escape(content)
        return f"\\[{content}\\]" if options["display_mode"] else f"\\({content}\\)"

    def text(self, source: str) -> str:
        """Markdown of the book, with the roles of MyST in plain words."""
        source = LABEL.sub(lambda match: f"\\tag{{{self.equations[match[1]]}}}\n$$", HEADING.sub("", source))
        return self.parser.render(LINK.sub(r"\1", ROLE.sub(self._role, source)))

    def _role(self, match: re.Match[str]) -> str:
        role, target = match.groups()
        if role.startswith("cite"):
            return f"[{'; '.join(map(self._citation, target.split(',')))}]"
        if role == "eq":
            return f"({self.equations.get(target, '?')})"
        return "the figure" if role == "numref" else target.partition("<")[0].strip()

    def _citation(self, key: str) -> str:
        entry = self.books[key.strip()]
        authors = entry.persons["author"]
        return f"{' '.join(authors[0].last_names)}{' et al.' if len(authors) > 1 else ''} {entry.fields['year']}"

    def outputs(self, cell: NotebookNode) -> Iterable[str]:
        """What a code cell printed and drew."""
        mystnb = cell.metadata.get("mystnb", {})
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                yield data["text/html"]
            elif "image/png" in data:
                alt, caption = mystnb.get("image", {}).get("alt", ""), mystnb.get("figure", {}).get("caption", "")
                yield f'<img src="data:image/png;base64,{data["image/png"].strip()}" alt="{html.escape(alt)}">'
                yield f'<p class="caption">{html.escape(caption)}</p>'
            elif "text/markdown" in data:
                yield self.text(data["text/markdown"])
            elif text := output.get("text") or data.get("text/plain", ""):
                yield f"<pre>{html.escape(text)}</pre>"

    def parts(self, cell: NotebookNode) -> list[str]:
        """The content of a cell on a slide."""
        if cell.cell_type == "markdown":
            return [self.text(cell.source)]
        code = "slide-code" in cell.metadata.get("tags", ())
        source = [highlight(cell.source, PythonLexer(), CODE)] if code else []
        return [*source, *self.outputs(cell)]


def slides_of(notebook: NotebookNode, chapter: int) -> tuple[str, list[Slide]]:
    """The title and the slides of a chapter.

    Args:
        notebook: The chapter.
        chapter: Its number.

    Returns:
        The chapter's title, and a slide for each cell that is tagged so.
    """
    renderer = Renderer(chapter, notebook.cells)
    title, section, slides = "", "", list[Slide]()
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", ())
        for _, heading in HEADING.findall(cell.source) if cell.cell_type == "markdown" else ():
            section = renderer.parser.renderInline(heading)
            title = title or section
        if "slide" in tags or ("slide-more" in tags and not slides):
            slides.append(Slide(section))
        if {"slide", "slide-more"} & set(tags):
            slides[-1].parts += renderer.parts(cell)
            slides[-1].notes += [notes] if (notes := cell.metadata.get("notes")) else []
    return title, slides


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="../reveal/reset.css">
<link rel="stylesheet" href="../reveal/reveal.css">
<link rel="stylesheet" href="../reveal/theme/white.css">
<style>
:root {{ --r-main-font-size: 34px; --r-heading1-size: 2.2em; --r-heading2-size: 1.3em; }}
:root {{ --r-heading-text-transform: none; }}
.reveal .slides section {{ text-align: left; }}
.reveal .slides section > h2 {{ margin-bottom: 0.6em; }}
.reveal img {{ display: block; height: 440px; max-width: 100%; object-fit: contain; margin: 0.2em auto; }}
.reveal .caption {{ font-size: 0.65em; color: #555; text-align: center; }}
.reveal table {{ font-size: 0.8em; }}
.reveal pre {{ width: auto; font-size: 0.6em; box-shadow: none; background: #f4f4f4; padding: 0.6em; }}
.reveal ul {{ margin-left: 1em; }}
.reveal li {{ margin-bottom: 0.3em; }}
mjx-assistive-mml {{ contain: strict; }} /* unseen, for screen readers: takes no room on a slide */
.dager-explore {{ text-align: center; }}
{code}
</style>
<script>window.MathJax = {{ tex: {{ inlineMath: [["\\\\(", "\\\\)"]] }}, options: {{ enableMenu: false }} }};</script>
</head>
<body>
<div class="reveal"><div class="slides">
<section><h1>{title}</h1><p>What a gradient gives away</p></section>
{slides}
</div></div>
<script src="../reveal/reveal.js"></script>
<script src="../reveal/notes.js"></script>
<script src="../mathjax/tex-mml-chtml.js"></script>
<script>
MathJax.startup.promise.then(function () {{
  Reveal.initialize({{ width: 1280, height: 720, margin: 0.06, hash: true, slideNumber: "c/t", transition: "none",
                       center: false, plugins: [RevealNotes] }});
}});
</script>
</body>
</html>
"""


def main() -> None:
    """Write a deck for every notebook that has slides, and a page that lists them."""
    if not (SITE / "reveal").is_dir():
        sys.exit("make slides: the book is not built: run `make book` first")
    (SITE / "slides").mkdir(exist_ok=True)
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        number = int(path.stem[:2]) if path.stem[:2].isdigit() else 0
        title, slides = slides_of(nbformat.read(path, as_version=4), number)
        if slides:
            text = "\n".join(slide.html() for slide in slides)
            page = PAGE.format(title=title, slides=text, code=CODE.get_style_defs(".highlight"))
            (SITE / "slides" / f"{path.stem}.html").write_text(page, "utf-8")
            print(f"_build/html/slides/{path.stem}.html: {len(slides)} slides")


if __name__ == "__main__":
    main()
