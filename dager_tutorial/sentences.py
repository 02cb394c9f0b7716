"""Which confirmed prefixes are whole texts.

The tree of prefixes shows where texts end only at its leaves; a text that is a prefix of another ends inside it. The
last block tells: a loss that reads only each text's last token leaves, in the output map of the last block's attention,
gradient rows of exactly these tokens (chapter 4). Where every token carries a loss, as in next-token training, all prefixes
pass, and the leaves are what can be said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Tree
from .models.base import DecoderAdapter, Tap
from .subspace import Span

# Tokens that go through the whole network at once.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Texts:
    """The recovered texts.

    Attributes:
        nodes: Indices of the tree's nodes at which a text ends.
        confirmed: For each, whether the last block confirms it (True where the last block cannot tell).
    """

    nodes: tuple[int, ...]
    confirmed: tuple[bool, ...]


def whole_texts(adapter: DecoderAdapter, tree: Tree, tap: Tap | None, span: Span | None) -> Texts:
    """Decide which prefixes of the tree are whole texts.

    Args:
        adapter: The architecture.
        tree: The confirmed prefixes.
        tap: A tap of the last block whose gradient was shared, or None.
        span: Its span, or None.
    """
    leaves = tree.leaves()
    if tap is None or span is None or not leaves:
        return Texts(tuple(leaves), (True,) * len(leaves))
    ratios = _last_block_ratios(adapter, tree, leaves, tap, span)
    ends = {index for index, ratio in ratios.items() if ratio <= span.bound}
    if len(ends) == len(ratios) or not ends:
        return Texts(tuple(leaves), (bool(ends),) * len(leaves))
    # A leaf that is no end is a text cut short, unless a text ends on the way to it: then it is a stray extension.
    cut = [leaf for leaf in leaves if leaf not in ends and not ends & set(_ancestors(tree, leaf))]
    found = sorted(ends | set(cut))
    return Texts(tuple(found), tuple(index in ends for index in found))


def _ancestors(tree: Tree, index: int) -> list[int]:
    """The prefixes of a node, itself included, shortest first."""
    path: list[int] = []
    step: int | None = index
    while step is not None:
        path.append(step)
        step = tree.nodes[step].parent
    return path[::-1]


def _last_block_ratios(adapter: DecoderAdapter, tree: Tree, leaves: list[int], tap: Tap, span: Span) -> dict[int, float]:
    """Ratio of every real prefix in the last block, by one forward pass over the leaves."""
    ratios: dict[int, float] = {}
    device = adapter.first_input.tokens.device
    longest = max(len(tree.nodes[leaf].tokens) for leaf in leaves)
    for group in torch.tensor(leaves).split(max(1, TOKENS_AT_ONCE // longest)):
        paths = [_ancestors(tree, leaf) for leaf in group.tolist()]
        ids, mask = _padded([tree.nodes[path[-1]].tokens for path in paths], device)
        starts = torch.tensor([tree.nodes[path[-1]].start for path in paths], device=device)
        vectors = adapter.tap_inputs(ids, mask, [tap], starts=starts)[tap]
        for path, rows in zip(paths, vectors, strict=True):
            ratios.update(zip(path, span.ratio(rows[: len(path)]).tolist(), strict=True))
    return ratios


def _padded(sequences: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (int64, batch x longest), padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in sequences], device=device)
    return ids, mask
