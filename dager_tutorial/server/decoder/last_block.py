"""Where texts end by the last block, where no gap proves it: there all of its taps together fit best.

Chapter `12_federated`.

Where a loss reads only each text's last token, the last block has rows of these tokens alone. A text's last row fits
there better than the rows before it and any behind it, gap or no gap, by far in the mean over the taps and mostly at
each of them; of a text that is not there, or not yet whole, all rows fit about alike. And since all blocks lie before
it, this row tells of the whole text: it fits worse where a token is missing, wrong or one too many.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import QUERY, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.last_rows import last_ratios
from dager_tutorial.server.decoder.passage import Prefix
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.subspace import Span


class End(NamedTuple):
    """Where a text ends.

    Attributes:
        node: The prefix that fits best.
        misfit: How badly it fits: the logarithm of its residual in units of a true row's, the mean over the taps.
        margin: By how much the next best prefix fits worse.
        agreed: Whether it fits best at every single tap.
    """

    node: int
    misfit: float
    margin: float
    agreed: bool

    @property
    def clear(self) -> bool:
        """Whether the text goes on nowhere: a prefix that is no end hardly fits better than those beside it."""
        return self.misfit <= constants().seen_misfit and self.margin >= constants().end_margin


@dataclass(frozen=True)
class LastBlock:
    """Tells ends by the last block.

    Attributes:
        adapter: The architecture.
        spans: Of the last block's taps, as far as they were shared and have room.
    """

    adapter: DecoderAdapter
    spans: Mapping[Tap, Span]

    @property
    def tells(self) -> bool:
        """Whether enough taps were shared to name the same place."""
        return len(self.spans) >= 2

    def ends(self, tree: Tree, leaves: list[int]) -> dict[int, End]:
        """For leaves the prefix on the way to each at which its text ends; without those on which none is clear.

        Args:
            tree: The likeliest prefixes.
            leaves: Indices of its nodes.
        """
        if not self.tells or not leaves:
            return {}
        ratios = last_ratios(self.adapter, tree, leaves, self.spans)
        found = {leaf: self._end(tree, leaf, ratios) for leaf in leaves}
        return {leaf: end for leaf, end in found.items() if end is not None and end.clear}

    def singles_out(self, text: Prefix) -> bool:
        """Whether a text fits better than its prefixes at every tap, and by as much as a true end does.

        Args:
            text: Token ids.
        """
        tree = Tree.of({text: 1.0}, rotary=self.adapter.first_input.positions is None)
        end = self._end(tree, len(tree.nodes) - 1, last_ratios(self.adapter, tree, tree.leaves(), self.spans))
        if end is None or not end.agreed or end.node != len(tree.nodes) - 1:
            return False
        return end.margin >= constants().end_margin

    def misfits(self, texts: Sequence[Prefix]) -> list[float]:
        """How badly texts fit as whole ones: as `End.misfit`, of their last rows; infinite where no tap can tell.

        Args:
            texts: Token ids.
        """
        tree = Tree.of(dict.fromkeys(texts, 1.0), rotary=self.adapter.first_input.positions is None)
        places = {node.tokens: index for index, node in enumerate(tree.nodes)}
        ends = [places[text] for text in texts]
        ratios = last_ratios(self.adapter, tree, list(dict.fromkeys(ends)), self.spans) if ends else {}
        return [self._misfit(tree, end, ratios) for end in ends]

    def _misfit(self, tree: Tree, end: int, ratios: Mapping[Tap, Mapping[int, float]]) -> float:
        """The mean over the taps of the logarithm of a row's residual."""
        logs = [self._log(tap, found[end]) for tap, found in ratios.items() if _counting(tree, tap, found, [end])]
        return statistics.mean(logs) if logs else math.inf

    def _log(self, tap: Tap, ratio: float) -> float:
        """The logarithm of a residual in units of a true row's."""
        return math.log(max(ratio, 1e-30)) + math.log(self.spans[tap].bound)

    def _end(self, tree: Tree, leaf: int, ratios: Mapping[Tap, Mapping[int, float]]) -> End | None:
        """The prefix on the way to a leaf that fits best; None where no tap says anything of one."""
        logs = [
            {node: self._log(tap, found[node]) for node in _counting(tree, tap, found, tree.path(leaf))}
            for tap, found in ratios.items()
        ]
        said = [each for each in logs if each]
        if not said:
            return None
        means = {node: statistics.mean(each[node] for each in said) for node in set.intersection(*map(set, said))}
        order = sorted(means, key=means.__getitem__)
        margin = means[order[1]] - means[order[0]] if len(order) > 1 else 0.0
        agreed = all(min(each, key=each.__getitem__) == order[0] for each in said)
        return End(order[0], means[order[0]], margin, agreed)


def _counting(tree: Tree, tap: Tap, found: Mapping[int, float], nodes: Sequence[int]) -> list[int]:
    """Those of some prefixes of which a tap says something."""
    # A softmax over one key is constant: a first token has no query gradient.
    return [node for node in nodes if node in found and (tap.kind != QUERY or tree.nodes[node].parent is not None)]
