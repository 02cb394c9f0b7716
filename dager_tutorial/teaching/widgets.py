"""Figures with sliders: live in a running notebook, and as ready-made frames in a page without any kernel.

Both come from one call. The notebook's output holds an ipywidgets view and, beside it, plain HTML with a picture for
each setting and ordinary `<input type=range>` sliders. A page of the built book shows the latter: it needs no network,
no kernel and no widget library. Each frame says what it shows,
and a screen reader hears it when a slider moves.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

MOST_FRAMES = 60  # a page should stay below a megabyte
PALETTE = 64  # colours of a frame: a figure has few, and the picture becomes a third as large

VIEW = "application/vnd.jupyter.widget-view+json"

Draw = Callable[..., Figure]
Parameters = dict[str, Sequence[Any]]
FRAME = "max-width:max(100%,34rem);height:auto"  # on a phone it scrolls in its box, and its letters can be read


@dataclass(frozen=True)
class Frame:
    """One setting of the sliders.

    Attributes:
        picture: A PNG.
        description: What the picture shows at this setting.
    """

    picture: bytes
    description: str


def explore(
    draw: Draw, *, caption: str, alt: str, describe: Callable[..., str] | None = None, **parameters: Sequence[Any]
) -> None:
    """Show a figure with a slider for each parameter.

    Args:
        draw: Called with a value for each parameter, by name; returns a figure.
        caption: One or two sentences below the picture: what to look at.
        alt: What the picture shows at every setting, for those who do not see it.
        describe: Called like `draw`; says in a sentence what is seen at a setting. If it is left out, the titles of the
            figure say it: let them carry the result.
        parameters: The values of each parameter in the order of its slider; underscores in a name become blanks. The
            first value is shown first. At most 60 settings in all.

    Raises:
        ValueError: There is no parameter, one has no value, or there are more than 60 settings.
    """
    count = _settings(parameters)
    if not 0 < count <= MOST_FRAMES:
        raise ValueError(f"{count} settings of the sliders: give between 1 and {MOST_FRAMES}")
    frames = {}
    for values in itertools.product(*parameters.values()):
        setting = dict(zip(parameters, values, strict=True))
        figure = draw(**setting)
        frames[values] = Frame(
            description=_description(setting, describe(**setting) if describe else titles(figure)),
            picture=png(figure),
        )
    live = _live(frames, caption, parameters)
    bundle: dict[str, Any] = {"text/plain": f"<figure with sliders: {', '.join(parameters)}; {count} frames>"}
    bundle["text/html"] = _page(list(frames.values()), caption, alt, parameters)
    bundle[VIEW] = {"version_major": 2, "version_minor": 0, "model_id": live.model_id}
    display(bundle, raw=True)


def png(figure: Figure) -> bytes:
    """A figure as a PNG of few colours; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    small = io.BytesIO()
    picture = Image.open(buffer).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def titles(figure: Figure) -> str:
    """The titles of a figure and its parts as one line of text, formulas in plain letters."""
    found = [figure.get_suptitle(), *(ax.get_title(loc) for ax in figure.axes for loc in ("left", "center", "right"))]
    text = "; ".join(re.sub(r"\s*\n\s*", ", ", title.strip()) for title in found if title.strip())
    return re.sub(r"\\(?:mathrm|mathcal|mathbf|text)\b|[${}\\]", "", text)


def _description(setting: dict[str, Any], said: str) -> str:
    place = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in setting.items())
    return f"{place}: {said}" if said else place


def _settings(parameters: Parameters) -> int:
    count = 1 if parameters else 0
    for values in parameters.values():
        count *= len(values)
    return count


def _live(frames: dict[tuple[Any, ...], Frame], caption: str, parameters: Parameters) -> ipywidgets.Widget:
    """The sliders of a running notebook."""
    first = next(iter(frames.values()))
    picture = ipywidgets.Image(value=first.picture, format="png", layout={"max_width": "100%"})
    said = ipywidgets.HTML(_live_region(first.description))
    sliders = [
        ipywidgets.SelectionSlider(
            options=[(_shown(value), value) for value in values],
            description=name.replace("_", " "),
            style={"description_width": "initial"},
            layout={"width": "28em"},
        )
        for name, values in parameters.items()
    ]

    def move(_: Any) -> None:
        frame = frames[tuple(slider.value for slider in sliders)]
        picture.value = frame.picture
        said.value = _live_region(frame.description)

    for slider in sliders:
        slider.observe(move, names="value")
    return ipywidgets.VBox([*sliders, picture, said, ipywidgets.HTML(html.escape(caption))])


def _live_region(text: str) -> str:
    return f'<span role="status" aria-live="polite">{html.escape(text)}</span>'


def _page(frames: list[Frame], caption: str, alt: str, parameters: Parameters) -> str:
    """The sliders of a page: one picture for each setting, the last parameter's values running fastest."""
    name = hashlib.sha256(f"{alt}{parameters}".encode()).hexdigest()[:8]
    sources = [f"data:image/png;base64,{base64.b64encode(frame.picture).decode()}" for frame in frames]
    descriptions = [frame.description for frame in frames]
    labels = [[_shown(value) for value in values] for values in parameters.values()]
    rows = "".join(map(_slider, parameters, labels))
    first = html.escape(f"{alt} At {descriptions[0]}")
    return (
        f'<div class="dager-explore" id="explore-{name}" role="group" aria-label="{html.escape(alt)}">{rows}'
        f'<div class="frame" style="overflow-x:auto"><img src="{sources[0]}" alt="{first}" style="{FRAME}"></div>'
        f'<p class="said" role="status" aria-live="polite">{html.escape(descriptions[0])}</p>'
        f'<p class="caption">{html.escape(caption)}</p>'
        f"<script>(function () {{\n"
        f'const box = document.getElementById("explore-{name}");\n'
        f"const alt = {_script(alt)};\n"
        f"const frames = {_script(sources)};\n"
        f"const said = {_script(descriptions)};\n"
        f"const labels = {_script(labels)};\n"
        f"{SCRIPT}}})();</script></div>"
    )


def _slider(key: str, shown: list[str]) -> str:
    first = html.escape(shown[0])
    return (
        f'<label style="display:block">{html.escape(key.replace("_", " "))} '
        f'<input type="range" min="0" max="{len(shown) - 1}" value="0" step="1" aria-valuetext="{first}" '
        f'style="vertical-align:middle"> <output>{first}</output></label>'
    )


def _script(value: Any) -> str:
    """A value as a script may hold it: nothing in it ends the script."""
    return json.dumps(value).replace("</", "<\\/")


SCRIPT = """\
const sliders = Array.from(box.querySelectorAll("input"));
const outputs = box.querySelectorAll("output");
const picture = box.querySelector("img");
const status = box.querySelector(".said");
function show() {
  let frame = 0;
  sliders.forEach(function (slider, index) {
    const label = labels[index][Number(slider.value)];
    frame = frame * labels[index].length + Number(slider.value);
    outputs[index].textContent = label;
    slider.setAttribute("aria-valuetext", label);
  });
  picture.src = frames[frame];
  picture.alt = alt + " At " + said[frame];
  if (status.textContent !== said[frame]) status.textContent = said[frame];
}
sliders.forEach(function (slider) { slider.addEventListener("input", show); slider.value = 0; });
show();
"""


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
