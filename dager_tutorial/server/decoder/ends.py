"""Which confirmed prefixes are whole texts (chapter `06_decoder_recovery`).

The tree of prefixes shows where texts end only at its leaves; a text that is a prefix of another ends inside it. The
last block tells: where a loss reads only each text's last token, the last block's queries and the output map of its
attention have gradient rows of exactly these tokens. Where every token carries a loss, as in next-token training, all
prefixes pass, and the leaves are what can be said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import QUERY, Tap
from dager_tutorial.server.decoder.last_rows import last_ratios
from dager_tutorial.server.decoder.neighbours import Neighbours
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Texts:
    """The recovered texts.

    Attributes:
        nodes: Indices of the tree's nodes at which a text ends.
        confirmed: Those of them where the last block has a row, told from those of other texts.
        seen: Whether the last block tells ends from other places at all.
        crowded: Whether more prefixes passed its tests than its rank allows, so that the likeliest were taken: as many
            ends as the rank tells prove nothing then.
    """

    nodes: tuple[int, ...]
    confirmed: frozenset[int]
    seen: bool
    crowded: bool = False


def whole_texts(
    adapter: DecoderAdapter,
    tree: Tree,
    last: Mapping[Tap, Span],
    *,
    complete: bool = False,
    neighbours: Neighbours | None = None,
) -> Texts:
    """Decide which prefixes of the tree are whole texts.

    Args:
        adapter: The architecture.
        tree: The confirmed prefixes.
        last: Spans of the last block's query and attention output taps, as far as they were shared.
        complete: Whether the tree holds every row of the batch, so that a text ends at each of its leaves.
        neighbours: What confirms an end where the client's steps moved the inputs; None where passing the test does.

    Returns:
        The leaves where no tap sees ends; else every end that the last block has a row of, and leaves without one
        where a text was cut short, or where a text must end.
    """
    leaves = tree.leaves()
    if not last or not leaves:
        return Texts(tuple(leaves), frozenset(), seen=False)
    ends, inside, crowded = _ends(adapter, tree, leaves, last)
    if not inside:
        return Texts(tuple(leaves), frozenset(), seen=False)
    # A leaf that is no end is a text cut short, unless a text ends on the way to it: then it is a stray extension.
    cut = [leaf for leaf in leaves if leaf not in ends and (complete or not ends & set(tree.path(leaf)))]
    room = len(cut) if complete else max(0, _rank(last) - len(ends))
    longest = sorted(cut, key=lambda leaf: (-len(tree.nodes[leaf].tokens), tree.nodes[leaf].ratio))[:room]
    proven = frozenset(index for index in ends if neighbours is None or neighbours.apart(tree.nodes[index]))
    return Texts(tuple(sorted(ends.union(longest))), proven, seen=True, crowded=crowded and neighbours is None)


def _ends(
    adapter: DecoderAdapter, tree: Tree, leaves: list[int], last: Mapping[Tap, Span]
) -> tuple[set[int], set[int], bool]:
    """Prefixes that the last block has rows of, and those it has not, by one forward pass over the leaves.

    The third is True where more prefixes pass than the rank allows, so that the likeliest were taken.
    """
    ratios = last_ratios(adapter, tree, leaves, last)
    # Where every token carries a loss none is surely without a row, though a small one may drown in rounding, and
    # sooner a query's than its attention output's.
    steadiest = min(last, key=lambda tap: tap.kind == QUERY)
    surely_none = last[steadiest].between / last[steadiest].bound
    if all(ratio <= surely_none for ratio in ratios[steadiest].values()):
        return set(ratios[steadiest]), set(), False
    worst = {index: max(ratios[tap][index] for tap in last) for index in ratios[steadiest]}
    passing = {index for index, ratio in worst.items() if ratio <= 1}
    # Queries alone say nothing of a first token: it may be a whole text, but never by their word.
    silent = {index for index in passing if _begins(tree, index)} if steadiest.kind == QUERY else set()
    ends = _possible(tree, passing - silent, worst, _rank(last))
    return ends, set(worst) - ends, ends != passing


def _rank(last: Mapping[Tap, Span]) -> int:
    """How many ends there are: a gap tells it, and where there is none, no tap has more directions."""
    clear = [span.rank for span in last.values() if span.clear]
    return max(clear or [span.rank for span in last.values()])


def _possible(tree: Tree, ends: set[int], ratios: Mapping[int, float], rank: int) -> set[int]:
    """The likeliest ends, no more than the rank: rows of different texts are independent.

    First tokens come last: trained models give all of them nearly one state, and no query gradient speaks for them.
    """
    likeliest = sorted(ends, key=lambda index: (_begins(tree, index), ratios[index]))
    return set(likeliest[:rank])


def _begins(tree: Tree, index: int) -> bool:
    """Whether a prefix is a first token."""
    return tree.nodes[index].parent is None
