"""How well prefixes fit in the last block, all prefixes of a tree by one forward pass.

Chapter `06_decoder_recovery`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.streaming import tokens_at_once
from dager_tutorial.models.tap import QUERY, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.subspace import Span


def last_ratios(
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
