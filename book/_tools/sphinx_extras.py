"""A small Sphinx extension: docstrings written for people, and pages without scripts that the book does not use."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE = re.compile(r"(`[^`]*`)")
PLACE = re.compile(r"<factory>|\w*Path\('[^']*'\)")  # no Python, or where a folder lies on this machine


def escape_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep the bars of absolute values from being read as substitutions; code stays as it is."""
    for index, line in enumerate(lines):
        if ">>>" not in line:
            parts = CODE.split(line)
            lines[index] = "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def describe(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Append what stands beside a docstring: of members that explain themselves, of constants, and what an alias is."""
    lines += [*_members(thing), *_constants(thing)]
    if getattr(thing, "__module__", "") == "jaxtyping":
        lines += [f"Alias of ``{thing.__name__}``.", ""]


def _members(thing: Any) -> Iterator[str]:
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        for member in thing:
            meaning, advice = getattr(member, "meaning", ""), getattr(member, "advice", "")
            if meaning:
                yield f"- ``{member.value}``: {meaning}. *{advice[:1].upper()}{advice[1:]}.*"
        yield ""


def _constants(thing: Any) -> Iterator[str]:
    for field in _explained(thing):
        yield f"- ``{field.name} = {field.default:g}``: {field.metadata['meaning']} ({field.metadata['origin']})"
    yield ""


def _explained(thing: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that say themselves what they mean."""
    if not (isinstance(thing, type) and dataclasses.is_dataclass(thing)):
        return []
    return [field for field in dataclasses.fields(thing) if {"meaning", "origin"} <= set(field.metadata)]


def shorten(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Leave out signatures that say nothing: of an enumeration, of constants that are listed below."""
    if _explained(thing) or (isinstance(thing, type) and issubclass(thing, enum.Enum)):
        return "", returned
    # Sphinx shows a signature that is no Python as one long line.
    return PLACE.sub("...", signature) if signature else signature, returned


def skip_fields(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which their class describes already, and folders of this machine."""
    return True if type(thing).__name__ == "_tuplegetter" or isinstance(thing, Path) else None


def drop_thebe(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Thebe would run cells in the page through a server elsewhere; its script is declared twice, which is an error."""
    context["script_files"] = [script for script in context["script_files"] if "thebe" not in _content(script)]


def _content(script: Any) -> str:
    attributes = getattr(script, "attributes", {})
    return f"{script} {getattr(script, 'filename', '')} {attributes.get('body', '')}".lower()


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
