"""One search for all: grow the tree of prefixes, one position at a time, by whatever selector is given.

Chapter `06_decoder_recovery`.

In a causal model a token's state depends on its prefix only, so that prefixes can be confirmed from left to right.

With rotary positions a first token repeated ([A], [A, A], ...) has the same state at every length, so that every length
passes. Such chains are put aside and followed afterwards, and only while the gradient holds something unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.decoder.front import Extension, Front
from dager_tutorial.server.decoder.selector import Chosen, Selector
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.token_filter import Candidates


@dataclass
class TreeSearch:
    """Grows a tree of prefixes; which extensions are kept is what the selector decides.

    Attributes:
        candidates: Tokens that may stand at each position.
        selector: Chooses extensions.
        budget: What it may cost.
        expected_rows: The number of distinct prefixes, where a clear rank tells it, else None.
        tree: What was confirmed so far.
    """

    candidates: Candidates
    selector: Selector
    budget: Budget
    expected_rows: int | None = None
    tree: Tree = field(default_factory=Tree)

    @torch.no_grad()
    def run(self) -> Tree:
        """Grow until no prefix can be extended; then follow repeated first tokens if something is unexplained."""
        chains = self._grow(self.selector.block.empty(), 0)
        position = 1
        while chains is not None and chains.nodes and position < self.selector.longest_repeat and not self._explained():
            position += 1
            chains = self._grow(chains, position)
        return self.tree

    def _stopped(self) -> bool:
        """Whether the time is spent, or going on makes no sense."""
        return self.budget.late or (self.selector.certain and self.tree.overflowed)

    def _explained(self) -> bool:
        return self._stopped() or (self.expected_rows is not None and self.tree.distinct_rows() >= self.expected_rows)

    def _grow(self, front: Front, position: int) -> Front | None:
        """Grow a front from a position to the end; returns the repeats one token longer than the front, put aside."""
        aside: Front | None = None
        while position < self.selector.block.adapter.max_positions and not self._stopped():
            if position and not front.nodes and not self._begins_at(position):
                break
            grown = self._step(front, position)
            repeats = [place for place, node in enumerate(grown.nodes) if self.tree.nodes[node].repeats]
            if repeats:
                aside = grown.take(repeats) if aside is None else aside
                grown = grown.take([place for place in range(len(grown.nodes)) if place not in set(repeats)])
            front = grown
            position += 1
            self.budget.report("search", self.tree.distinct_rows(), self.expected_rows)
        return aside

    def _begins_at(self, position: int) -> bool:
        """Whether a text may begin behind the first position: padded on the left, without position ids."""
        return not self.candidates.every_position and position < len(self.candidates.tokens)

    def _step(self, front: Front, position: int) -> Front:
        """Extend every prefix by every candidate of a position, and begin new ones where texts may begin."""
        block, tokens = self.selector.block, self.candidates.at(position)
        if not len(tokens):
            return block.empty()
        extension = (
            block.placed(self._everywhere, position)
            if self.candidates.every_position and position >= len(self.candidates.prompt)
            else block.extension(position, tokens)
        )
        chosen = self._best(self.selector.select(front, extension))
        if not len(chosen.pairs):
            return block.empty()
        nodes = [
            self.tree.grow(
                front.nodes[place] if place >= 0 else None, token, start=position, ratio=ratio, rotary=block.rotary
            )
            for (place, _), token, ratio in zip(
                chosen.pairs.tolist(), tokens[chosen.pairs[:, 1]].tolist(), chosen.ratios.tolist(), strict=True
            )
        ]
        return block.grown(front, extension, chosen.pairs, nodes)

    @cached_property
    def _everywhere(self) -> Extension:
        """The candidates of every position, before any rotation: computed once."""
        return self.selector.block.unplaced(self.candidates.tokens[0])

    def _best(self, chosen: Chosen) -> Chosen:
        """As many of the chosen as there can be, the best, in their order."""
        self.tree.overflowed |= len(chosen.pairs) > self.selector.widest
        best = chosen.ratios.argsort(stable=True)[: self.selector.widest].sort().values
        return Chosen(chosen.pairs[best], chosen.ratios[best])
