"""Pictures that commands draw into files."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from dager_tutorial import files
from dager_tutorial.errors import DagerError, quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dager_tutorial.evaluation.scaling import ScalingRun
    from dager_tutorial.evaluation.tables.curves import Curves

KINDS = (".png", ".svg", ".pdf")


def drawable(path: Path | None) -> Path | None:
    """The callback of a picture's option: refuses what cannot be drawn before any work is done for it.

    Args:
        path: What the user named, or None.

    Raises:
        DagerError: The ending says no kind of picture, the file cannot be written, or matplotlib is missing.
    """
    if path is None:
        return None
    if path.suffix.lower() not in KINDS:
        raise DagerError(f"{quote(path)} is no picture: let its name end in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DagerError("pictures need matplotlib: pip install 'dager-tutorial[notebooks]'") from error
    return files.writable(path)


def draw_scaling(path: Path, runs: Sequence[ScalingRun], powers: Mapping[str, float | None]) -> None:
    """Seconds of each stage against rows, both logarithmic, with the exponents of growth.

    Args:
        path: The file to write; its ending says which kind.
        runs: What was measured.
        powers: The exponents, by stage and of the total.

    Raises:
        DagerError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    from dager_tutorial.evaluation.scaling import SHORTEST

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, rows = figure.add_subplot(), [run.rows for run in runs]
    for stage, marker in zip(powers, "os^D", strict=True):
        times = [run.seconds if stage == "total" else run.stage_seconds[stage] for run in runs]
        power = powers[stage]
        label = stage if power is None else f"{stage}: rows to the {power:.1f}"
        axes.loglog(rows, [max(time, SHORTEST) for time in times], marker=marker, label=label)
    axes.set(xlabel="rows of the batch", ylabel="seconds", title=f"The attack on {runs[0].model}")
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())


def draw_figure(path: Path, curves: Curves) -> None:
    """A figure of the paper: ours as lines, the published points as crosses, levels as dashed lines.

    Args:
        path: The file to write; its ending says which kind.
        curves: What it shows.

    Raises:
        DagerError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), marker in zip(curves.points.items(), itertools.cycle("os^Dv")):
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    for name, points in curves.paper.items():
        axes.plot(*zip(*points, strict=True), "x", color="0.2", markersize=9, label=name)
    for name, level in curves.levels.items():
        axes.axhline(level, color="0.4", linestyle="--", label=f"{name} {level:g}")
    if curves.width is not None:
        axes.axvline(curves.width, color="0.7", linestyle=":", label="the model's width")
    if curves.logarithmic:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=curves.across, ylabel=curves.up, title=curves.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.supxlabel(textwrap.fill(curves.note, 110), fontsize="x-small")
    with files.replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())
