"""Whether the last block tells a text from those that differ from it in one token.

Chapter `12_federated`.

Where the client's steps moved the inputs, the span test forgives as much as they moved, and that may be more than one
token does to a text's last row: its beginnings pass, too, and a text whose true end the search never reached would be
called whole. So an end is proven only where no neighbour of the text fits about as well: not the text without its last
token, not with any further one, not with another one in any place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.last_rows import last_ratios
from dager_tutorial.server.decoder.tree import Node, Tree
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates


@dataclass(frozen=True)
class Neighbours:
    """Compares texts with their neighbours in the last block.

    Attributes:
        adapter: The architecture.
        last: Spans of the last block with a clear gap.
        candidates: Tokens that may stand at each position.
        generator: Source of randomness, on the CPU.
    """

    adapter: DecoderAdapter
    last: Mapping[Tap, Span]
    candidates: Candidates
    generator: torch.Generator

    def apart(self, node: Node) -> bool:
        """Whether every neighbour of a text fits worse, by more than a true row's residual may be off.

        Args:
            node: The text.
        """
        tree = Tree()
        own = self._grown(tree, None, node.tokens, node.start)
        before = tree.nodes[own].parent
        others = [*self._longer(tree, own), *self._replaced(tree, node), *([] if before is None else [before])]
        ratios = last_ratios(self.adapter, tree, tree.leaves(), self.last)
        worst = {index: max(each[index] for each in ratios.values()) for index in next(iter(ratios.values()))}
        least = min((worst[index] for index in others if index in worst), default=math.inf)
        return own in worst and least > constants().model_error * worst[own]

    def _longer(self, tree: Tree, own: int) -> list[int]:
        """The text with each token behind it that may stand there."""
        node = tree.nodes[own]
        tokens = self.candidates.at(node.start + len(node.tokens)).tolist()
        return [self._grown(tree, own, (token,), node.start) for token in tokens]

    def _replaced(self, tree: Tree, node: Node) -> list[int]:
        """The text with another token that may stand there, once for each place."""
        others = []
        for place, token in enumerate(node.tokens):
            rivals = [each for each in self.candidates.at(node.start + place).tolist() if each != token]
            if rivals:
                rival = rivals[int(torch.randint(len(rivals), (1,), generator=self.generator))]
                before = place - 1 if place else None  # the text's own prefixes stand first in the tree
                others.append(self._grown(tree, before, (rival, *node.tokens[place + 1 :]), node.start))
        return others

    def _grown(self, tree: Tree, parent: int | None, tokens: tuple[int, ...], start: int) -> int:
        """The place of a prefix with some tokens behind it."""
        rotary = self.adapter.first_input.positions is None
        for token in tokens:
            parent = tree.grow(parent, token, start=start, ratio=1.0, rotary=rotary)
        assert parent is not None, "at least one token is added"
        return parent
