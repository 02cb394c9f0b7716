"""Small pictures as SVG: elements of XML, so that nothing in them can be anything but text. The page styles them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from dager_tutorial.evaluation.ladder import Rung
from dager_tutorial.report.readings import MapReading, Spectrum
from dager_tutorial.report.sentences import PRIVATE

LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 34.0
CLOSE = 0.1
SMALL, WIDE = (300.0, 190.0), (460.0, 190.0)


class _Frame:
    """A picture with two axes."""

    def __init__(self, described: str, size: tuple[float, float], across: tuple[float, float], up: tuple[float, float]):
        width, height = size
        self.across, self.up = across, up
        self.right, self.bottom = width - RIGHT, height - BOTTOM
        box = f"0 0 {width:g} {height:g}"
        self.root = ElementTree.Element("svg", {"viewBox": box, "role": "img", "aria-label": described})

    def x(self, value: float) -> float:
        """Where a value stands, from the left."""
        first, last = self.across
        return LEFT + (value - first) / (last - first) * (self.right - LEFT)

    def y(self, value: float) -> float:
        """Where a value stands, from the top."""
        first, last = self.up
        return self.bottom - (value - first) / (last - first) * (self.bottom - TOP)

    def text(self, x: float, y: float, said: str, anchor: str = "middle", kind: str = "label") -> None:
        """Write something."""
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind}
        ElementTree.SubElement(self.root, "text", place).text = said

    def line(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        """Draw a straight line between two places."""
        places = dict(zip(("x1", "y1", "x2", "y2"), (f"{each:.1f}" for each in (*start, *end)), strict=True))
        ElementTree.SubElement(self.root, "line", places | {"class": kind})

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Draw a line through values."""
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        ElementTree.SubElement(self.root, "polyline", {"points": places, "class": kind})

    def dot(self, x: float, y: float, kind: str) -> None:
        """Mark a value."""
        place = {"cx": f"{self.x(x):.1f}", "cy": f"{self.y(y):.1f}", "r": "3", "class": kind}
        ElementTree.SubElement(self.root, "circle", place)

    def ticks_across(self, ticks: Iterable[tuple[float, str]], title: str) -> None:
        """The lower axis."""
        self.line((LEFT, self.bottom), (self.right, self.bottom), "axis")
        for value, said in ticks:
            self.text(self.x(value), self.bottom + 14, said)
        self.text((LEFT + self.right) / 2, self.bottom + 29, title, kind="title")

    def ticks_up(self, ticks: Iterable[tuple[float, str]]) -> None:
        """The left axis, with faint lines across."""
        for value, said in ticks:
            self.line((LEFT, self.y(value)), (self.right, self.y(value)), "grid")
            self.text(LEFT - 6, self.y(value) + 3.5, said, "end")

    def written(self) -> str:
        """The picture as SVG."""
        return ElementTree.tostring(self.root, encoding="unicode")


def draw_spectrum(spectrum: Spectrum) -> str:
    """Singular values on a logarithmic axis: signal, noise, the noise's edge and the rank.

    Args:
        spectrum: What to draw.
    """
    values = [(place, math.log10(max(value, 1e-17))) for place, value in spectrum.points]
    floor = math.log10(max(spectrum.edge, 1e-17))
    least = max(math.floor(min([floor, *(value for _, value in values)])), -17)
    described = (
        f"Singular values of {spectrum.name}: {spectrum.rank} of {spectrum.width} stand above the noise, "
        f"which reaches {spectrum.edge:.1e} of the largest."
    )
    frame = _Frame(described, SMALL, (0, spectrum.width), (least, 0.3))
    frame.ticks_up((power, _power(power)) for power in range(0, int(least) - 1, -_step(least)))
    ends = [(0, "1"), (spectrum.width, str(spectrum.width))]
    room = spectrum.width * CLOSE  # two labels that are nearer would overlap
    frame.ticks_across([end for end in ends if abs(end[0] - spectrum.rank) > room], "singular value, by size")
    frame.line((LEFT, frame.y(floor)), (frame.right, frame.y(floor)), "edge")
    if spectrum.rank:
        frame.line((frame.x(spectrum.rank), TOP), (frame.x(spectrum.rank), frame.bottom), "cut")
        frame.text(frame.x(spectrum.rank), frame.bottom + 14, str(spectrum.rank), kind="label strong")
    frame.path((point for point in values if point[0] <= spectrum.rank), "signal")
    frame.path((point for point in values if point[0] > spectrum.rank), "noise")
    return frame.written()


def draw_ranks(maps: Sequence[MapReading]) -> str:
    """The rank of every map against its block.

    Args:
        maps: The readings, at least one.
    """
    last, width = max(each.block for each in maps), max(each.width for each in maps)
    ranks = [each.rank for each in maps]
    described = f"Ranks of {len(maps)} maps, from {min(ranks)} to {max(ranks)}, of {width} that are possible."
    frame = _Frame(described, WIDE, (-0.5, last + 0.5), (0, width * 1.08))
    frame.ticks_up([(0, "0"), (width, str(width))])
    step = max(1, math.ceil((last + 1) / 12))
    frame.ticks_across([(block, str(block)) for block in range(0, last + 1, step)], "block")
    for place, kind in enumerate(dict.fromkeys(each.kind for each in maps)):
        own = [each for each in maps if each.kind == kind]
        frame.path(((each.block, each.rank) for each in own), f"kind{place}")
        for each in own:
            frame.dot(each.block, each.rank, f"kind{place}" if each.clear else f"kind{place} open")
    return frame.written()


def draw_noise(rungs: Sequence[Rung]) -> str:
    """The share that came back against the length of the noise.

    Args:
        rungs: The rungs of added noise, at least two.
    """
    levels = [math.log10(rung.level) for rung in rungs]
    shares = ", ".join(f"{rung.level:g}: {rung.words:.0%}" for rung in rungs)
    frame = _Frame(
        f"Words recovered by length of the noise over that of the update: {shares}.",
        WIDE,
        (min(levels) - 0.2, max(levels) + 0.2),
        (0, 1.05),
    )
    frame.ticks_up([(0, "0 %"), (0.5, "50 %"), (1, "100 %")])
    powers = range(math.ceil(min(levels)), math.floor(max(levels)) + 1)
    frame.ticks_across([(power, _power(power)) for power in powers], "length of the noise over that of the update")
    if rungs[-1].deviation >= PRIVATE:
        frame.text(frame.right, frame.bottom - 8, "differential privacy", "end")
    for kind, values in (("words", [rung.words for rung in rungs]), ("exact", [rung.exact for rung in rungs])):
        frame.path(zip(levels, values, strict=True), kind)
        for level, value, rung in zip(levels, values, rungs, strict=True):
            frame.dot(level, value, f"{kind} open" if rung.late else kind)
    return frame.written()


def _power(power: int) -> str:
    """Ten to a power, as people write it."""
    return "1" if power == 0 else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _step(least: float) -> int:
    return max(1, math.ceil(-least / 5))
