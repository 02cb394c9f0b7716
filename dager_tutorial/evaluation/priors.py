"""Attacks by gradient matching, DAGER as its paper writes it, and this project's attack, on the same updates."""

from __future__ import annotations

from dager_tutorial.baselines.told import Told
from dager_tutorial.client.batch import Truth


def told_of(truth: Truth, *, labels: bool = True) -> Told:
    """What earlier attacks are told of a batch.

    Args:
        truth: What the client kept.
        labels: Whether they are told the labels, too.
    """
    return Told(tuple(map(len, truth.sequences)), truth.labels if labels else None)
