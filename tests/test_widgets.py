"""Figures with sliders, token strips and the style, without a browser."""

from __future__ import annotations

import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pytest
import torch

from dager_tutorial.teaching import plotting, widgets


def draw(rows: int, noise: float = 0.0) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.set_title(f"{rows} {noise}")
    return figure


@pytest.fixture
def shown(monkeypatch):
    """A function that explores and returns what the notebook would show, by MIME type."""
    bundles = []
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: bundles.append(bundle))

    def explore(**parameters):
        widgets.explore(draw, caption="rows & noise", alt="a title", **parameters)
        return bundles[-1]

    return explore


def test_a_page_has_a_frame_for_every_setting_and_the_same_bytes_twice(shown):
    page = shown(rows=[1, 2, 3], noise=[0.0, 1e-5])["text/html"]
    frames = re.search(r"const frames = \[(.*?)\];", page)[1].split(", ")
    assert len(set(frames)) == len(frames) == 6
    assert '[["1", "2", "3"], ["0", "1e-05"]]' in page
    assert page.count('type="range"') == 2 and "rows &amp; noise" in page
    assert page == shown(rows=[1, 2, 3], noise=[0.0, 1e-5])["text/html"]
    assert "http" not in page


def test_a_running_notebook_gets_sliders_that_change_the_picture(monkeypatch, shown):
    boxes = []
    monkeypatch.setattr(widgets, "_live", lambda *given, make=widgets._live: boxes.append(make(*given)) or boxes[0])
    bundle = shown(rows=[1, 2, 3])
    (box,) = boxes
    assert bundle[widgets.VIEW]["model_id"] == box.model_id
    slider, picture = box.children[0], box.children[1]
    before = picture.value
    slider.value = 3
    assert picture.value != before
    slider.value = 1
    assert picture.value == before


def test_no_figure_stays_open(shown):
    shown(rows=[1, 2])
    assert plt.get_fignums() == []


@pytest.mark.parametrize("parameters", [{}, {"rows": []}, {"rows": range(61)}])
def test_too_many_or_no_settings_are_refused(parameters):
    with pytest.raises(ValueError, match="settings"):
        widgets.explore(draw, caption="", alt="", **parameters)


def test_a_token_strip_shows_strangers_text_as_text(tiny_bert):
    strip = plotting.TokenStrip(("<script>", "·a"), ("true", ""))
    assert "<script>" not in strip._repr_html_()
    ids = tiny_bert.tokenizer("the film was bad")["input_ids"]
    strip = plotting.token_strip(tiny_bert.tokenizer, ids, {ids[1]: "true"})
    assert strip.marks == ("special", "true", "", "", "", "special")
    assert repr(strip) == "[CLS]|the|film|was|bad|[SEP]"


def test_a_matrix_shows_its_numbers_and_shape():
    plotting.use_style()
    figure, ax = plt.subplots()
    plotting.matrix(ax, torch.tensor([[1.0, -2.5, -0.0], [0, 0, 0]]), "X")
    assert [text.get_text() for text in ax.texts] == ["1.0", "-2.5", "0.0", "0.0", "0.0", "0.0"]
    assert ax.get_title() == "X\n2 x 3"
    plt.close(figure)


def test_source_is_shown_without_docstring_and_whole():
    source = plotting.show_source(plotting.visible).data
    assert source.startswith("```python\ndef visible(text: str) -> str:\n    return ") and ">>>" not in source
