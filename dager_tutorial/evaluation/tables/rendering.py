"""Tables as Markdown and as a page of HTML (chapter `15_reproducing_the_paper`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jinja2 import Environment, StrictUndefined

from dager_tutorial.errors import printable
from dager_tutorial.evaluation.tables.layout import PAPER, View

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th[scope=row], td.source, thead th:nth-child(-n+2) { text-align: left; }
thead th { border-bottom: 2px solid #555; }
tr.paper th, tr.paper td { border-top: 1px solid #bbb; color: #444; }
tr.ours td { font-weight: 600; }
li { font-size: .9rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for view in views %}
<h2>{{ view.title | clean }}</h2>
<div class="wide">
<table>
<thead><tr><th scope="col">setting</th><th scope="col">figures</th>
{%- for column in view.columns %}<th scope="col">{{ column | clean }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in view.lines %}
<tr class="{{ 'paper' if line.source == paper else 'ours' }}"><th scope="row">{{ line.about | clean }}</th>
<td class="source">{{ line.source | clean }}</td>
{% for cell in line.cells %}<td>{{ cell | clean }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<ul>
{% for remark in view.remarks %}
<li>{{ remark | clean }}</li>
{% endfor %}
</ul>
{% endfor %}
</body>
</html>
"""


def as_markdown(views: Iterable[View], title: str) -> str:
    """Tables as Markdown.

    Args:
        views: The tables.
        title: Above all of them.
    """
    return "\n\n".join([f"# {title}", *map(_markdown, views)]) + "\n"


def _markdown(view: View) -> str:
    lines = [
        _row(["setting", "figures", *view.columns]),
        _row(["---", "---", *["---:"] * len(view.columns)]),
        *(_row([line.about, line.source, *line.cells]) for line in view.lines),
    ]
    remarks = "\n".join(f"- {_escaped(remark)}" for remark in view.remarks)
    return f"## {_escaped(view.title)}\n\n" + "\n".join(lines) + f"\n\n{remarks}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that Markdown takes as text."""
    signs = str.maketrans({sign: f"\\{sign}" for sign in "\\|`*_<[]"})
    return printable(text).translate(signs)


def as_html(views: Sequence[View], title: str) -> str:
    """Tables as a page that needs no network. Names in them come from strangers: they are text on it.

    Args:
        views: The tables.
        title: Above all of them.
    """
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["clean"] = printable
    return made.from_string(PAGE).render(views=views, title=title, paper=PAPER)
