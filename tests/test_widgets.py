"""Figures with sliders, token strips and the style, without a browser."""

from __future__ import annotations

import json
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
    assert page.count("aria-valuetext=") == 2
    assert page == shown(rows=[1, 2, 3], noise=[0.0, 1e-5])["text/html"]
    assert "http" not in page


def test_each_frame_says_what_it_shows(shown):
    page = shown(rows=[1, 2], noise=[0.0, 1e-5])["text/html"]
    said = ["rows 1, noise 0: 1 0.0", "rows 1, noise 1e-05: 1 1e-05", "rows 2, noise 0: 2 0.0"]
    assert json.loads(re.search(r"const said = (\[.*\]);", page)[1])[:3] == said
    assert f'alt="a title At {said[0]}"' in page
    assert f'role="status" aria-live="polite">{said[0]}<' in page
    page = shown(rows=[1], describe=lambda rows: f"</script> {rows} & more")["text/html"]
    assert page.count("</script>") == 1 and "&lt;/script&gt; 1 &amp; more" in page


def test_titles_are_read_aloud_as_plain_words():
    figure, (left, right) = plt.subplots(1, 2)
    left.set_title("rank $r = \\mathrm{12}$\nof 30")
    right.set_title("3 rows", loc="left")
    assert widgets.titles(figure) == "rank r = 12, of 30; 3 rows"
    plt.close(figure)


def test_a_running_notebook_gets_sliders_that_change_the_picture(monkeypatch, shown):
    boxes = []
    monkeypatch.setattr(widgets, "_live", lambda *given, make=widgets._live: boxes.append(make(*given)) or boxes[0])
    bundle = shown(rows=[1, 2, 3])
    (box,) = boxes
    assert bundle[widgets.VIEW]["model_id"] == box.model_id
    slider, picture, said = box.children[:3]
    before = picture.value
    assert 'aria-live="polite">rows 1: 1 0.0<' in said.value
    slider.value = 3
    assert picture.value != before
    assert 'aria-live="polite">rows 3: 3 0.0<' in said.value
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


def test_marks_are_told_apart_without_colour():
    """Every mark has its own line below, and what is true, false or unknown its own sign."""
    assert len({mark.line.partition(" #")[0] for mark in plotting.MARKS.values()}) == len(plotting.MARKS)
    assert all(contrast("#111111", mark.background) > 7 for mark in plotting.MARKS.values())
    strip = plotting.TokenStrip(("the", "film", "?"), ("true", "false", ""))
    page = strip._repr_html_()
    assert "✓</span>the" in page and "✗</span>film" in page
    assert 'aria-label="tokens: the (true), film (false), ?"' in page


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(text: str, background: str) -> float:
    """As WCAG defines it: 1 for equal colours, 21 for black on white."""
    light, dark = sorted((luminance(text), luminance(background)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


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
