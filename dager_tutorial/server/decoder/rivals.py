"""Which of the extensions of one length go on: those of each beginning that are hardly behind its best.

Chapter `12_federated`.

Several texts may begin with the same token, some with weaker rows than others; so beams are told apart by a few first
tokens, and a prefix has rivals among those of its own beginning only. Where a text is followed well, all others fall
behind it within a row or two and one prefix is left; where its rows are weak, many are about as good and go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.paths import Paths, Row, circular


def going_on(
    paths: Paths,
    made: list[Row],
    order: list[int],
    outstanding: set[int],
    known: Sequence[tuple[int, ...]] = (),
) -> list[int]:
    """The rows whose prefixes go on, in their order.

    Those with which a known text begins are nobody's rivals: another text may begin as it does, or a little like it.

    Args:
        paths: The rows before them.
        made: Rows of one length.
        order: Indices of those that may go on, the best first.
        outstanding: Indices of those of which all rows stand out so far.
        known: Texts that were told before. Where there are some, few are left to be found, and of what begins unlike
            them more rivals go on.
    """
    order, best = _unlike(paths, made, order), dict[tuple[int, ...], float]()
    begun = {text[: made[0].position + 1] for text in known}
    alike = {text[: constants().first_tokens] for text in known}
    chosen, counts = [], Counter[tuple[int, ...]]()
    for index in order:
        root = made[index].root
        if begun and paths.text(made[index]) in begun:
            chosen.append(index)
            continue
        best.setdefault(root, made[index].total)
        further = bool(known) and root[: constants().first_tokens] not in alike
        if counts[root] < _room(made[index], best[root], outstanding=index in outstanding, further=further):
            counts[root] += 1
            chosen.append(index)
    return chosen


def _room(row: Row, best: float, *, outstanding: bool, further: bool) -> int:
    """How many prefixes of a beginning may go on, if one that ends in this row is to be among them.

    A beginning none of whose first rows stands out keeps its best: the row may be weak, not the text false. Later on, a
    prefix hardly makes up for a whole row.
    """
    if len(row.root) < constants().beginning:
        if outstanding:
            return constants().widest_beam // len(row.root)
        return 0 if row.parent is None else constants().beam
    behind = (best - row.total) / max(best, 1e-3) * (row.position + 1)
    if further:
        return constants().rivals_left if behind <= constants().behind_left else 0
    return constants().rivals if behind <= constants().behind else 0


def _unlike(paths: Paths, made: list[Row], order: list[int]) -> list[int]:
    """Of rows in their order those that end in a way of their own, and the best of every beginning.

    One that ends like a better one of its beginning is a copy with a wrong token further back, one that ends like
    that of another text is that text's rows behind its own end; one that ends like itself before goes round in a
    circle, whose rows are alike at every turn.
    """
    best: dict[tuple[int, ...], int] = {}
    first: dict[tuple[int, ...], int] = {}
    alike = constants().alike
    for index in order:
        row = made[index]
        text = paths.text(row)
        end = text[-alike:]
        if circular(text):
            continue
        first.setdefault(row.root, index)
        rival = best.setdefault(end if len(text) >= alike else text, index)
        if made[rival].root != row.root and paths.recent(made[rival]) < paths.recent(row):
            best[end] = index
    unlike = {*best.values(), *first.values()}
    return [index for index in order if index in unlike]
