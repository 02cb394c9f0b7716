"""Confirmed prefixes as a tree: what a search grows, and where its texts are read off.

Chapter `06_decoder_recovery`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """A prefix that the gradient confirms.

    Attributes:
        tokens: Its token ids.
        start: Position of its first token (0 but for texts padded on the left without position ids).
        ratio: The largest span ratio along the prefix.
        parent: Index of the prefix without the last token, or None.
        repeats: True for a rotary model's first token repeated, which every length explains equally well.
    """

    tokens: tuple[int, ...]
    start: int
    ratio: float
    parent: int | None
    repeats: bool


@dataclass
class Tree:
    """All confirmed prefixes, shorter ones first.

    Attributes:
        nodes: The prefixes; a parent stands before its children.
        overflowed: More extensions passed at one length than there can be: the tests had no power left.
    """

    nodes: list[Node] = field(default_factory=list)
    overflowed: bool = False

    @classmethod
    def of(cls, texts: Mapping[tuple[int, ...], float], *, rotary: bool) -> Tree:
        """The prefixes of some texts, each once.

        Args:
            texts: Token ids of each, and the span ratio of its worst row.
            rotary: Whether repeats of a first token are one row.
        """
        tree, places = cls(), dict[tuple[int, ...], int]()
        for text, ratio in texts.items():
            for end in range(1, len(text) + 1):
                if text[:end] not in places:
                    before = places.get(text[: end - 1])
                    places[text[:end]] = tree.grow(before, text[end - 1], start=0, ratio=ratio, rotary=rotary)
        return tree

    def leaves(self) -> list[int]:
        """Indices of prefixes that no other confirmed prefix extends; chains of repeats that lead nowhere left out."""
        useful = self._useful()
        parents = {node.parent for index, node in enumerate(self.nodes) if index in useful}
        return [index for index in sorted(useful) if index not in parents]

    def real(self) -> list[int]:
        """Indices of prefixes that stand for a row of their own."""
        return sorted(self._useful())

    def path(self, index: int) -> list[int]:
        """The prefixes of a node, itself included, shortest first."""
        path: list[int] = []
        step: int | None = index
        while step is not None:
            path.append(step)
            step = self.nodes[step].parent
        return path[::-1]

    def distinct_rows(self) -> int:
        """How many different rows the prefixes stand for: a chain of repeats is one."""
        return sum(not node.repeats for node in self.nodes)

    def grow(self, parent: int | None, token: int, *, start: int, ratio: float, rotary: bool) -> int:
        """Enter a confirmed prefix.

        Args:
            parent: Index of the prefix that it extends, or None where a text begins.
            token: Token id that it adds.
            start: Position of its first token.
            ratio: The span ratio of its last row.
            rotary: Whether repeats of a first token are one row.

        Returns:
            Its index.
        """
        before = None if parent is None else self.nodes[parent]
        if before is None:
            node = Node((token,), start, ratio, None, repeats=False)
        else:
            chain = rotary and before.tokens[0] == token and (before.repeats or len(before.tokens) == 1)
            node = Node((*before.tokens, token), before.start, max(ratio, before.ratio), parent, repeats=chain)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _useful(self) -> set[int]:
        """Nodes that are no repeat, and whatever leads to them."""
        useful: set[int] = set()
        for index, node in enumerate(self.nodes):
            if node.repeats:
                continue
            step: int | None = index
            while step is not None and step not in useful:
                useful.add(step)
                step = self.nodes[step].parent
        return useful
