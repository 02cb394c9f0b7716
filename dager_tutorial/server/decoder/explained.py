"""Which texts have rows of their own: a text whose rows better ones have, too, is likely none.

Chapter `12_federated`.

A token's row fits much as well behind a wrong prefix as behind the true one: behind the same token before, and where
positions are learned, at the same place. So the best text explains the rows of texts that are put together from its
tokens, and those that are left have a share of their evidence from rows that no better one has.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, compress
from math import inf

from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.paths import Paths, Row


def unexplained(
    paths: Paths, ends: Iterable[int], *, rotary: bool, prompted: int, clearly: float = 0.0, least: float = 0.0
) -> list[int]:
    """Last rows of the texts that have rows of their own.

    Args:
        paths: All rows.
        ends: Last rows of texts, the best text first.
        rotary: Whether positions enter in the attention only, so that a row tells nothing of its place.
        prompted: How many tokens all texts begin with, which tell for none.
        clearly: How many times a text's evidence a row must have to explain one of it.
        least: The evidence that a text's own rows need at least.
    """
    explained: dict[tuple[str, int | None, int], float] = {}
    chosen = []
    for end in ends:
        path = [paths.rows[step] for step in paths.path(end)]
        marks = [_marks(before, row, rotary) for before, row in zip([None, *path], path, strict=False)][prompted:]
        evidence = [row.evidence for row in path[prompted:]]
        level = sum(evidence) / max(1, len(evidence))  # a prefix of the prompt has no rows yet
        own = [all(explained.get(mark, -inf) < clearly * level for mark in each) for each in marks]
        if sum(compress(evidence, own)) >= max(least, constants().own_share * sum(evidence)):
            chosen.append(end)
            for mark in chain(*marks):
                explained[mark] = max(level, explained.get(mark, -inf))
    return chosen


def _marks(before: Row | None, row: Row, rotary: bool) -> set[tuple[str, int | None, int]]:
    """By what a row of one text explains that of another."""
    marks = {("behind", None if before is None else before.token, row.token)}
    return marks if rotary else {*marks, ("at", row.position, row.token)}
