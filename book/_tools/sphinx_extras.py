"""A small Sphinx extension: docstrings written for people, and pages without scripts that the book does not use."""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"(`[^`]*`)")


def escape_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep the bars of absolute values from being read as substitutions; code stays as it is."""
    for index, line in enumerate(lines):
        if ">>>" not in line:
            parts = CODE.split(line)
            lines[index] = "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def skip_fields(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which their class describes already."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def drop_thebe(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Thebe would run cells in the page through a server elsewhere; its script is declared twice, which is an error."""
    context["script_files"] = [script for script in context["script_files"] if "thebe" not in _content(script)]


def _content(script: Any) -> str:
    attributes = getattr(script, "attributes", {})
    return f"{script} {getattr(script, 'filename', '')} {attributes.get('body', '')}".lower()


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
