"""Which confirmed prefixes are whole texts (chapter `06_decoder_recovery`).

The tree of prefixes shows where texts end only at its leaves; a text that is a prefix of another ends inside it. The
last block tells: where a loss reads only each text's last token, the last block's queries and the output map of its
attention have gradient rows of exactly these tokens. Where every token carries a loss, as in next-token training, all
prefixes pass, and the leaves are what can be said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.streaming import tokens_at_once
from dager_tutorial.models.tap import QUERY, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Texts:
    """The recovered texts.

    Attributes:
        nodes: Indices of the tree's nodes at which a text ends.
        confirmed: Those of them where the last block has a row.
        seen: Whether the last block tells ends from other places at all.
        crowded: Whether more prefixes passed its tests than its rank allows, so that the likeliest were taken: as many
            ends as the rank tells prove nothing then.
    """

    nodes: tuple[int, ...]
    confirmed: frozenset[int]
    seen: bool
    crowded: bool = False


def whole_texts(adapter: DecoderAdapter, tree: Tree, last: Mapping[Tap, Span], *, complete: bool = False) -> Texts:
    """Decide which prefixes of the tree are whole texts.

    Args:
        adapter: The architecture.
        tree: The confirmed prefixes.
        last: Spans of the last block's query and attention output taps, as far as they were shared.
        complete: Whether the tree holds every row of the batch, so that a text ends at each of its leaves.

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
    room = len(cut) if complete else max(0, max(span.rank for span in last.values()) - len(ends))
    longest = sorted(cut, key=lambda leaf: (-len(tree.nodes[leaf].tokens), tree.nodes[leaf].ratio))[:room]
    return Texts(tuple(sorted(ends.union(longest))), frozenset(ends), seen=True, crowded=crowded)


def _ends(
    adapter: DecoderAdapter, tree: Tree, leaves: list[int], last: Mapping[Tap, Span]
) -> tuple[set[int], set[int], bool]:
    """Prefixes that the last block has rows of, and those it has not, by one forward pass over the leaves.

    The third is True where more prefixes pass than the rank allows, so that the likeliest were taken.
    """
    ratios = _last_ratios(adapter, tree, leaves, last)
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
    ends = _possible(tree, passing - silent, worst, max(span.rank for span in last.values()))
    return ends, set(worst) - ends, ends != passing


def _last_ratios(
    adapter: DecoderAdapter, tree: Tree, leaves: list[int], last: Mapping[Tap, Span]
) -> dict[Tap, dict[int, float]]:
    """For each tap of the last block the ratio of every prefix over the tap's bound.

    A first token repeated is one row at every length: the shortest stands for all.
    """
    ratios: dict[Tap, dict[int, float]] = {tap: {} for tap in last}
    device = adapter.first_input.tokens.device
    for nodes in _packs(tree, leaves, tokens_at_once(adapter.network, constants().tokens_at_once)):
        ids, positions, sees = (part.to(device) for part in _sequence(tree, nodes))
        for tap, vectors in adapter.tree_inputs(ids, positions, sees, last).items():
            ratio = last[tap].ratio(vectors) / last[tap].bound
            if tap.kind == QUERY:  # a softmax over one key is constant: a first token has no query gradient
                ratio[torch.tensor([tree.nodes[node].parent is None for node in nodes], device=device)] = 0
            values = zip(nodes, ratio.tolist(), strict=True)
            ratios[tap].update((node, value) for node, value in values if not tree.nodes[node].repeats)
    return ratios


def _packs(tree: Tree, leaves: list[int], most: int) -> Iterator[list[int]]:
    """The prefixes on the way to some leaves, each once and behind its own, as many as go through at once."""
    pack: dict[int, None] = {}
    for leaf in leaves:
        path = tree.path(leaf)
        if pack and len(pack) + len(path) > most:
            yield list(pack)
            pack = {}
        pack.update(dict.fromkeys(path))
    yield list(pack)


def _sequence(tree: Tree, nodes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Last token and position of each prefix (int64), and which prefixes are its own (nodes x nodes)."""
    place = {node: index for index, node in enumerate(nodes)}
    records = [tree.nodes[node] for node in nodes]
    sees = torch.eye(len(nodes), dtype=torch.bool)
    for index, record in enumerate(records):
        if record.parent is not None:
            sees[index] |= sees[place[record.parent]]
    ids = torch.tensor([record.tokens[-1] for record in records])
    positions = torch.tensor([record.start + len(record.tokens) - 1 for record in records])
    return ids, positions, sees


def _possible(tree: Tree, ends: set[int], ratios: Mapping[int, float], rank: int) -> set[int]:
    """The likeliest ends, no more than the rank: rows of different texts are independent.

    First tokens come last: trained models give all of them nearly one state, and no query gradient speaks for them.
    """
    likeliest = sorted(ends, key=lambda index: (_begins(tree, index), ratios[index]))
    return set(likeliest[:rank])


def _begins(tree: Tree, index: int) -> bool:
    """Whether a prefix is a first token."""
    return tree.nodes[index].parent is None
