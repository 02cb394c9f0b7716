"""Checks of chapter `16_sealed_envelopes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dager_tutorial.checks.common import answer, equal, passed

Tokens = tuple[int, ...]


def points(function: Callable[[set[Tokens], set[Tokens], set[Tokens]], int]) -> None:
    """The exercise on points: what claims and guesses are worth.

    Args:
        function: Takes the batch, the claimed texts and the guessed ones; returns their points.
    """
    batch = {(1, 2), (3,), (4, 5)}
    cases: list[tuple[set[Tokens], set[Tokens], int, str]] = [
        ({(1, 2), (3,)}, set(), 4, "A text of the batch that is claimed is worth two points."),
        (set(), {(1, 2), (9,)}, 1, "A guess is worth one point, and a false one costs nothing."),
        ({(1, 2), (9,)}, {(3,)}, -1, "A false claim costs four points."),
        ({(1, 2)}, {(1, 2)}, 2, "A text that is claimed and guessed counts once, as a claim."),
        (set(), set(), 0, "Nothing is worth nothing."),
    ]
    for claimed, guessed, expected, hint in cases:
        said = f"the points of claims {sorted(claimed)} and guesses {sorted(guessed)}"
        equal(answer(function, set(batch), claimed, guessed), expected, said, hint=hint)
    passed(function)


def control(function: Callable[[list[int], int], bool]) -> None:
    """The exercise on controls: whether a finding stands out from control runs.

    Args:
        function: Takes the confirmed rows of control runs and those of the true run; returns whether to believe it.
    """
    cases: list[tuple[list[int], int, bool, str]] = [
        ([0, 0, 0], 15, True, "Where controls find nothing, a finding stands out."),
        ([12, 9, 14], 13, False, "A control found more: so would chance."),
        ([3, 3, 3], 3, False, "As much as a control is not more."),
        ([0, 0, 0], 0, False, "Nothing found is nothing to believe."),
        ([2, 5, 1], 6, True, "More than every control: the largest counts, not the mean."),
        ([], 40, False, "Without a control run nothing can be said."),
    ]
    for controls, found, expected, hint in cases:
        given: Any = answer(function, controls, found)
        equal(bool(given), expected, f"the verdict on {found} rows beside controls {controls}", hint=hint)
    passed(function)
