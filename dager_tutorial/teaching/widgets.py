"""Figures with sliders: live in a running notebook, and as ready-made frames in a page without any kernel.

Both come from one call. The notebook's output holds an ipywidgets view and, beside it, plain HTML with a picture for
each setting and ordinary `<input type=range>` sliders. A page of the built book shows the latter: it needs no network,
no kernel and no widget library.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
from collections.abc import Callable, Sequence
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


def explore(draw: Draw, *, caption: str, alt: str, **parameters: Sequence[Any]) -> None:
    """Show a figure with a slider for each parameter.

    Args:
        draw: Called with a value for each parameter, by name; returns a figure.
        caption: One or two sentences below the picture: what to look at.
        alt: What the picture shows, for those who do not see it.
        parameters: The values of each parameter in the order of its slider; underscores in a name become blanks. The
            first value is shown first. At most 60 settings in all.

    Raises:
        ValueError: There is no parameter, one has no value, or there are more than 60 settings.
    """
    count = _settings(parameters)
    if not 0 < count <= MOST_FRAMES:
        raise ValueError(f"{count} settings of the sliders: give between 1 and {MOST_FRAMES}")
    frames = {
        values: png(draw(**dict(zip(parameters, values, strict=True))))
        for values in itertools.product(*parameters.values())
    }
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


def _settings(parameters: Parameters) -> int:
    count = 1 if parameters else 0
    for values in parameters.values():
        count *= len(values)
    return count


def _live(frames: dict[tuple[Any, ...], bytes], caption: str, parameters: Parameters) -> ipywidgets.Widget:
    """The sliders of a running notebook."""
    picture = ipywidgets.Image(value=next(iter(frames.values())), format="png", layout={"max_width": "100%"})
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
        picture.value = frames[tuple(slider.value for slider in sliders)]

    for slider in sliders:
        slider.observe(move, names="value")
    return ipywidgets.VBox([*sliders, picture, ipywidgets.HTML(html.escape(caption))])


def _page(frames: list[bytes], caption: str, alt: str, parameters: Parameters) -> str:
    """The sliders of a page: one picture for each setting, the last parameter's values running fastest."""
    name = hashlib.sha256(f"{alt}{parameters}".encode()).hexdigest()[:8]
    sources = [f"data:image/png;base64,{base64.b64encode(frame).decode()}" for frame in frames]
    labels = [[_shown(value) for value in values] for values in parameters.values()]
    rows = "".join(
        f'<label style="display:block">{html.escape(key.replace("_", " "))} '
        f'<input type="range" min="0" max="{len(shown) - 1}" value="0" step="1" style="vertical-align:middle"> '
        f"<output>{html.escape(shown[0])}</output></label>"
        for key, shown in zip(parameters, labels, strict=True)
    )
    return (
        f'<div class="dager-explore" id="explore-{name}">{rows}'
        f'<img src="{sources[0]}" alt="{html.escape(alt)}" style="max-width:100%">'
        f'<p class="caption">{html.escape(caption)}</p>'
        f"<script>(function () {{\n"
        f'const box = document.getElementById("explore-{name}");\n'
        f"const frames = {json.dumps(sources)};\n"
        f"const labels = {json.dumps(labels)};\n"
        f"{SCRIPT}}})();</script></div>"
    )


SCRIPT = """\
const sliders = Array.from(box.querySelectorAll("input"));
const outputs = box.querySelectorAll("output");
function show() {
  let frame = 0;
  sliders.forEach(function (slider, index) {
    frame = frame * labels[index].length + Number(slider.value);
    outputs[index].textContent = labels[index][Number(slider.value)];
  });
  box.querySelector("img").src = frames[frame];
}
sliders.forEach(function (slider) { slider.addEventListener("input", show); slider.value = 0; });
show();
"""


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
