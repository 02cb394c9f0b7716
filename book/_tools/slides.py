"""Make reveal.js slides from the notebooks of the book, by cell tags.

    python book/_tools/slides.py        writes _build/html/slides/<chapter>.html

A cell tagged `slide` is a slide: the text of a markdown cell, the output of a code cell. `slide-more` puts a cell onto
the slide before it, `slide-code` shows a code cell's source, too. The title is the section's heading. A cell's `notes`
(in its metadata) are what the speaker sees. Theorems, exercises and admonitions become boxes with the book's numbers,
a short folded answer appears on a click, a hint or a long answer stays out. The built book must be there: the slides
share its MathJax and reveal.js.
"""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import yaml
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
LABEL = re.compile(r"^( *)\$\$ *\(([\w-]+)\)$", re.MULTILINE)
ROLE = re.compile(r"\{(cite:[pt]|eq|numref|term|doc|ref|prf:ref)\}`([^`]*)`")
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\.(?:md|ipynb)(?:#[^)]*)?\)")
BOX = re.compile(
    r"^ *(?P<fence>:{3,})\{(?P<kind>[\w:]+)\} *(?P<title>[^\n]*)\n"
    r"(?P<options>(?: *:[\w-]+:[^\n]*\n)*)(?P<body>.*?)^ *(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
FOLDED = re.compile(r" *<details[^>]*>\s*<summary>(?P<title>.*?)</summary>(?P<body>.*?)</details>", re.DOTALL)
CODE = HtmlFormatter(style="friendly", nowrap=False)
NAMES = {"exercise": "Exercise", "prf:theorem": "Theorem", "prf:lemma": "Lemma", "prf:definition": "Definition"}
NAMES |= {"prf:algorithm": "Algorithm", "prf:corollary": "Corollary", "prf:proposition": "Proposition"}
MOST_WORDS = 45  # of an answer that is shown on a click


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


def chapters_in_order() -> list[Path]:
    """The chapters that the book numbers, as they follow each other."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    numbered = [chapter for part in contents["parts"] if part.get("numbered") for chapter in part["chapters"]]
    return [ROOT / f"{chapter['file']}.ipynb" for chapter in numbered]


def numbers_of(chapters: Iterable[tuple[int, list[NotebookNode]]]) -> dict[str, str]:
    """What the book calls each labelled thing: "(2.1)", "Theorem 2.1", "Fig. 2.1".

    Args:
        chapters: Number and cells of each chapter.

    Returns:
        By label, its name with its number.
    """
    names = {}
    for chapter, cells in chapters:
        counts: Counter[str] = Counter()
        for cell in cells:
            if "remove-cell" in cell.metadata.get("tags", ()):
                continue
            for kind, label in _labels(cell):
                counts[kind] += 1
                number = f"{chapter}.{counts[kind]}"
                names[label] = f"({number})" if kind == "equation" else f"{kind} {number}"
    return names


def _labels(cell: NotebookNode) -> Iterable[tuple[str, str]]:
    """Kind and label of what a cell defines, in order."""
    if cell.cell_type == "code":
        if name := cell.metadata.get("mystnb", {}).get("figure", {}).get("name"):
            yield "Fig.", name
        return
    found = [(match.start(), "equation", match[2]) for match in LABEL.finditer(cell.source)]
    for box in BOX.finditer(cell.source):
        if box["kind"] in NAMES:
            label = re.search(r":label: *(\S+)", box["options"])
            found.append((box.start(), NAMES[box["kind"]], label[1] if label else f"{id(cell)}-{box.start()}"))
    yield from (rest for _, *rest in sorted(found))


class Renderer:
    """Turns the cells of one chapter into HTML.

    Args:
        numbers: What the book calls each labelled thing.
    """

    def __init__(self, numbers: dict[str, str]) -> None:
        self.numbers = numbers
        self.books = parse_file(str(ROOT / "book" / "references.bib")).entries
        parser = MarkdownIt("commonmark", {"highlight": self._highlighted}).enable("table")
        self.parser = parser.use(dollarmath_plugin, renderer=self._math)

    @staticmethod
    def _math(content: str, options: dict[str, bool]) -> str:
        content = html.escape(content)
        return f"\\[{content}\\]" if options["display_mode"] else f"\\({content}\\)"

    @staticmethod
    def _highlighted(source: str, language: str, attributes: str) -> str:
        return highlight(source, PythonLexer(), HtmlFormatter(style="friendly", nowrap=True)) if language else ""

    def text(self, source: str) -> str:
        """Markdown of the book, with the roles and directives of MyST as boxes and in plain words."""
        if len(FOLDED.findall(source)) - source.count("<summary>Hint</summary>") > 1:  # a quiz: small, without answers
            return f'<div class="quiz">{self.text(FOLDED.sub("", source))}</div>'
        source = FOLDED.sub(self._answer, HEADING.sub("", source))
        source = BOX.sub(self._box, source)
        source = LABEL.sub(lambda match: f"{match[1]}\\tag{{{self._number(match[2])}}}\n{match[1]}$$", source)
        return self.parser.render(self._plain(source))

    def _plain(self, source: str) -> str:
        return LINK.sub(r"\1", ROLE.sub(self._role, source))

    def _number(self, label: str) -> str:
        return self.numbers.get(label, "?").strip("()")

    def _box(self, match: re.Match[str]) -> str:
        options = dict(re.findall(r":([\w-]+): *(.*)", match["options"]))
        kind = match["kind"]
        title = self.parser.renderInline(self._plain(match["title"].strip()))
        name = self.numbers.get(options.get("label", ""), NAMES.get(kind, ""))
        if kind == "prf:proof":
            name = "Proof"
        shown = f"{name} ({title})" if name and title else name or title
        look = options.get("class") or kind.removeprefix("prf:")
        body = self.text(match["body"])
        return _block(f'<div class="box {look}"><p class="box-title">{shown}</p>{body}</div>')

    def _answer(self, match: re.Match[str]) -> str:
        if match["title"].strip() != "Answer" or len(match["body"].split()) > MOST_WORDS:
            return ""
        body = self.text(match["body"].strip())
        return _block(f'<div class="box answer fragment"><p class="box-title">Answer</p>{body}</div>')

    def _role(self, match: re.Match[str]) -> str:
        role, target = match.groups()
        if role == "cite:t":
            return ", ".join(map(self._citation, target.split(",")))
        if role == "cite:p":
            return f"[{'; '.join(map(self._citation, target.split(',')))}]"
        said, _, label = target.rpartition("<")
        if role in ("term", "doc"):
            return said.strip() or target
        return said.strip() or self.numbers.get(label.strip(" >"), "?")

    def _citation(self, key: str) -> str:
        entry = self.books.get(key.strip())
        if entry is None:  # the build of the book says so
            return key
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
                alt, figure = mystnb.get("image", {}).get("alt", ""), mystnb.get("figure", {})
                caption = self.parser.renderInline(self._plain(figure.get("caption", "")))
                yield f'<img src="data:image/png;base64,{data["image/png"].strip()}" alt="{html.escape(alt)}">'
                yield f'<p class="caption"><b>{self.numbers.get(figure.get("name"), "")}</b> {caption}</p>'
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


def _block(page: str) -> str:
    """HTML as a block of its own in Markdown: without blank lines, which would end it."""
    return "\n\n" + re.sub(r"\n\s*\n", "\n", page) + "\n\n"


def slides_of(notebook: NotebookNode, numbers: dict[str, str]) -> tuple[str, list[Slide]]:
    """The title and the slides of a chapter.

    Args:
        notebook: The chapter.
        numbers: What the book calls each labelled thing.

    Returns:
        The chapter's title, and a slide for each cell that is tagged so.
    """
    renderer = Renderer(numbers)
    title, section, slides = "", "", list[Slide]()
    for cell in notebook.cells:
        tags, exercise = cell.metadata.get("tags", ()), ""
        for _, heading in HEADING.findall(cell.source) if cell.cell_type == "markdown" else ():
            shown = renderer.parser.renderInline(heading)
            title = title or shown
            if heading.startswith("Exercise:"):
                exercise = shown  # stands above its own slide only: the text goes on after it
            else:
                section = shown
        if "slide" in tags or ("slide-more" in tags and not slides):
            slides.append(Slide(exercise or section))
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
{style}
{code}
</style>
<script>window.MathJax = {{ tex: {{ inlineMath: [["\\\\(", "\\\\)"]] }}, options: {{ enableMenu: false }} }};</script>
</head>
<body>
<div class="reveal"><div class="slides">
<section class="cover"><h1>{title}</h1><p>What a gradient gives away</p></section>
{slides}
</div></div>
<script src="../reveal/reveal.js"></script>
<script src="../reveal/notes.js"></script>
<script src="../mathjax/tex-mml-chtml.js"></script>
<script>
MathJax.startup.promise.then(function () {{
  Reveal.initialize({{ width: 1280, height: 720, margin: 0.05, hash: true, slideNumber: "c/t", transition: "none",
                       center: false, display: "flex", plugins: [RevealNotes] }});
}});
</script>
</body>
</html>
"""

STYLE = """\
:root { --r-main-font-size: 34px; --r-heading1-size: 2.2em; --r-heading2-size: 1.3em; }
:root { --r-heading-text-transform: none; }
.reveal .slides section { text-align: left; flex-direction: column; height: 96%; }
.reveal .slides section > * { flex: none; }
.reveal .slides section.cover { justify-content: center; text-align: center; }
.reveal .slides section > h2 { margin-bottom: 0.4em; }
.reveal p, .reveal ul, .reveal ol { margin-block: 0.3em; }
.reveal ul, .reveal ol { margin-left: 1em; display: block; }
.reveal li { margin-bottom: 0.2em; }
/* a figure takes the room that the words leave */
.reveal .slides section > img { flex: 1 1 0; min-height: 300px; max-height: 500px; max-width: 100%; margin: 0.1em auto;
  object-fit: contain; }
.reveal .controls { font-size: 7px; bottom: 2px; right: 4px; }
.reveal .slide-number { right: auto; left: 8px; background: none; color: #444; font-size: 16px; }
.reveal .caption { font-size: 0.82em; line-height: 1.2; color: #333; text-align: center; }
.reveal table { font-size: 0.85em; margin: 0.3em auto; }
.reveal table :is(td, th) { padding: 0.15em 0.5em; }
.reveal pre { width: auto; margin: 0.3em 0; font-size: 0.7em; line-height: 1.3; box-shadow: none; background: #f4f4f4;
  padding: 0.6em; }
.reveal .quiz { font-size: 0.74em; }
.reveal .highlight pre { line-height: 1.2; padding-block: 0.3em; }
.reveal pre code { max-height: none; overflow: visible; padding: 0; }
.reveal code { font-size: 0.92em; }
.reveal .box { margin: 0.3em 0; padding: 0.1em 0.7em; border: 2px solid #44546a; }
.reveal .box-title { font-weight: 700; font-size: 0.9em; }
.reveal .box:is(.theorem, .lemma, .corollary, .proposition) { border-left-width: 12px; border-color: #0b62a8; }
.reveal .box:is(.definition, .algorithm) { border-left: 14px double #00705a; border-color: #00705a; }
.reveal .box.exercise { border-style: dashed; border-width: 3px; border-color: #7a3e8e; }
.reveal .box.warning { border-width: 5px; border-color: #a84300; }
.reveal .box.predict { border-width: 3px 0; border-color: #8a5a00; }
.reveal .box.question { border-style: dotted; border-width: 3px; }
.reveal .box.answer { border-width: 0 0 0 5px; border-color: #00705a; }
.reveal .box.proof { border-width: 0 0 0 2px; border-color: #999; }
mjx-assistive-mml { contain: strict; } /* unseen, for screen readers: takes no room on a slide */
.reveal mjx-container[display="true"] { margin: 0.4em 0 !important; }
.reveal .slides section > .dager-explore { flex: 1 1 0; min-height: 380px; max-height: 600px; display: flex;
  flex-direction: column; text-align: center; }
.dager-explore .frame { flex: 1 1 0; min-height: 0; }
.reveal .dager-explore .frame img { width: 100%; height: 100% !important; max-width: 100% !important; margin: 0;
  object-fit: contain; }
.dager-explore input { width: 12em; }
.dager-explore .said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
"""


def main() -> None:
    """Write a deck for every notebook that has slides."""
    if not (SITE / "reveal").is_dir():
        sys.exit("make slides: the book is not built: run `make book` first")
    (SITE / "slides").mkdir(exist_ok=True)
    numbered = chapters_in_order()
    notebooks = {path: nbformat.read(path, as_version=4) for path in sorted((ROOT / "book").glob("*.ipynb"))}
    numbers = numbers_of(
        (number, notebooks[path].cells) for number, path in enumerate(numbered, start=1) if path in notebooks
    )
    for path, notebook in notebooks.items():
        title, slides = slides_of(notebook, numbers)
        if slides:
            text = "\n".join(slide.html() for slide in slides)
            style = CODE.get_style_defs(".highlight")
            page = PAGE.format(title=title, slides=text, style=STYLE, code=style)
            (SITE / "slides" / f"{path.stem}.html").write_text(page, "utf-8")
            print(f"_build/html/slides/{path.stem}.html: {len(slides)} slides")


if __name__ == "__main__":
    main()
