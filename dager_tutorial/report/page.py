"""The report as one HTML page: no script, no network, everything escaped."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dager_tutorial.errors import printable
from dager_tutorial.evaluation.changes import NOISE
from dager_tutorial.report import pictures, sentences
from dager_tutorial.report.facts import Facts
from dager_tutorial.report.readings import most_rows

HIDDEN = "▮" * 8
"""What stands in place of a text, however long it is."""
NO_BREAK = chr(0xA0)


def page(facts: Facts) -> str:
    """Write the page.

    Args:
        facts: What to say.

    Returns:
        HTML5, complete. Names and texts come from strangers: they are text on it, whatever they hold.
    """
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": _percent, "short": _short, "bytes": _bytes, "clean": printable, "sentence": _sentence}
    template = resources.files("dager_tutorial.report").joinpath("page.html").read_text("utf-8")
    return made.from_string(template).render(
        facts=facts,
        hidden=HIDDEN,
        certainties=sentences.CERTAINTIES,
        said=sentences.SHORT,
        no_proof=sentences.NO_PROOF,
        weighed=any(text.copies is not None for text in facts.given.texts),
        rows=most_rows(facts.readings.maps),
        ladder_summary=sentences.ladder_summary(facts.ladder),
        **_pictures(facts),
    )


def _pictures(facts: Facts) -> dict[str, object]:
    """The drawings, as markup: `pictures` escapes what is in them."""
    maps, noises = facts.readings.maps, [rung for rung in facts.ladder if rung.kind == NOISE]
    return {
        "spectra": [(each, Markup(pictures.draw_spectrum(each))) for each in facts.readings.spectra],
        "ranks": Markup(pictures.draw_ranks(maps)) if maps else None,
        "noise": Markup(pictures.draw_noise(noises)) if len(noises) > 1 else None,
    }


def _percent(share: float) -> str:
    """A share for people: no digits behind the point, but none is rounded to all or nothing, and nothing breaks.

    >>> [_percent(share).replace(NO_BREAK, " ") for share in (0.5, 0.9999, 0.0001, 1)]
    ['50 %', '> 99 %', '< 1 %', '100 %']
    """
    if 0 < share < 0.01:
        return f"<{NO_BREAK}1{NO_BREAK}%"
    return f">{NO_BREAK}99{NO_BREAK}%" if 0.99 < share < 1 else f"{100 * share:.0f}{NO_BREAK}%"


def _short(value: float | None) -> str:
    """A number with three digits, a dash for None.

    >>> _short(0.000012345), _short(None), _short(3.0)
    ('1.23e-05', '–', '3')
    """
    return "–" if value is None else f"{value:.3g}"


def _sentence(text: str) -> str:
    """A sentence that begins with a capital and ends with a full stop.

    >>> _sentence("block 0 MLP")
    'Block 0 MLP.'
    """
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def _bytes(count: int) -> str:
    """A file's size.

    >>> _bytes(999), _bytes(106_000_000)
    ('999 bytes', '106.0 MB')
    """
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1e6:,.1f} MB"
