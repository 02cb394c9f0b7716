"""Where no gap stands below the signal: a beam for each first token, and texts that others explain taken out.

Chapter `12_federated`.

A beam over all prefixes collapses to the copies of one strong text. So every first token keeps its best prefixes, by
the evidence along them, whatever others have; and of the texts that come out, one that differs from a better one in a
few tokens is explained by it: only rows that no better text has count for it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, Front
from dager_tutorial.server.decoder.ranking import Ranking
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.odds import chance_quantile, usual
from dager_tutorial.server.token_filter import Candidates


@dataclass(frozen=True)
class _Row:
    """One token of a beam.

    Attributes:
        parent: Index of the row before, or None.
        token: Its id.
        root: The text's first token, behind its prompt.
        position: Where it stands.
        evidence: By how many deviations it fits better than false ones.
        total: The same, summed along the prefix.
        weak: How many rows in a row, this one included, do not stand out.
    """

    parent: int | None
    token: int
    root: int
    position: int
    evidence: float
    total: float
    weak: int


@dataclass
class BeamSearch:
    """Grows the beams of all first tokens together.

    Attributes:
        candidates: Tokens that may stand at each position.
        ranking: Weighs extensions.
        budget: What it may cost.
        rows: All rows that were ever kept, parents before children.
        seen: For each tap, the evidence of rows that stood out, summed: what it is worth.
        told: Whether the last block tells where texts end, so that nothing is cut off before it is asked.
    """

    candidates: Candidates
    ranking: Ranking
    budget: Budget
    rows: list[_Row] = field(default_factory=list)
    seen: Tensor | None = None
    told: bool = False

    @torch.no_grad()
    def run(self) -> Tree:
        """Grow until no beam has stood out for a while; the texts that nothing better explains, as a tree."""
        block, front, position = self.ranking.block, self.ranking.block.empty(), 0
        while position < block.adapter.max_positions and not self.budget.late and (front.nodes or not position):
            tokens = self.candidates.at(position)
            if not len(tokens):
                break
            front = self._grown(front, block.extension(position, tokens))
            position += 1
            self.budget.report("search", len(self.rows))
        return self._tree(self._unexplained())

    def _grown(self, front: Front, extension: Extension) -> Front:
        """The front one token longer."""
        pairs = self._different(front, extension, self.ranking.promising(front, extension))
        if self.budget.late or not len(pairs):
            return self.ranking.block.empty()
        evidence = self._evidence(front, extension, pairs)
        if self.budget.late:  # the last ones were not computed
            return self.ranking.block.empty()
        made = [self._row(front, extension, *each) for each in zip(pairs.tolist(), evidence.tolist(), strict=True)]
        kept = [i for i in self._kept(pairs, evidence, made) if made[i].weak <= constants().weak_rows]
        nodes = list(range(len(self.rows), len(self.rows) + len(kept)))
        self.rows += [made[index] for index in kept]
        return self.ranking.block.grown(front, extension, pairs[kept], nodes) if kept else self.ranking.block.empty()

    def _different(self, front: Front, extension: Extension, pairs: Tensor) -> Tensor:
        """Pairs but for a rotary model's first token repeated, whose state is the same at every length."""
        if not (self.ranking.block.rotary and extension.position == 1):
            return pairs
        first = torch.tensor([self.rows[node].token for node in front.nodes], device=pairs.device)
        return pairs[first[pairs[:, 0]] != extension.tokens[pairs[:, 1]]]

    def _evidence(self, front: Front, extension: Extension, pairs: Tensor) -> Float[Tensor, " pairs"]:
        """By how many deviations pairs fit better than false ones, taps weighed by what they were worth so far."""
        fits, false = self.ranking.deviations(front, extension, pairs)
        worth = torch.ones(len(fits), device=fits.device) if self.seen is None else self.seen.clamp(min=0)
        chance = usual(worth @ false)
        evidence = -chance.deviations(worth @ fits)
        outstanding = evidence >= self._needed(len(pairs))
        if bool(outstanding.any()) and bool(evidence.isfinite().all()):
            most = constants().leverage_shift
            found = -fits[:, outstanding].clamp(-most, most).sum(1)
            self.seen = found if self.seen is None else self.seen + found
        return evidence

    def _row(self, front: Front, extension: Extension, pair: list[int], evidence: float) -> _Row:
        """The row of a pair."""
        place, choice = pair
        token = int(extension.tokens[choice])
        prompted = len(self.candidates.prompt)
        strong = extension.position < prompted or evidence >= self._needed(len(extension.tokens))
        if place < 0:
            return _Row(None, token, token, extension.position, evidence, evidence, 0)
        before = self.rows[front.nodes[place]]
        weak = 0 if strong else before.weak + 1
        root = token if extension.position == prompted else before.root  # a prompt is the first token of all
        return _Row(front.nodes[place], token, root, extension.position, evidence, before.total + evidence, weak)

    def _kept(self, pairs: Int[Tensor, "pairs 2"], evidence: Float[Tensor, " pairs"], made: list[_Row]) -> list[int]:
        """Pairs that stand out among all and rival their prefix's best, and the best of each first token."""
        needed = self._needed(len(pairs), constants().false_alarms if int(pairs[0, 0]) >= 0 else 1.0)
        best = _best_of_each(pairs[:, 0], evidence)
        begins = pairs[:, 0] < 0
        rivals: Bool[Tensor, " pairs"] = (evidence >= needed) & (begins | (evidence >= constants().beside_best * best))
        kept = set(rivals.nonzero()[:, 0].tolist())
        order = sorted(range(len(made)), key=lambda index: -made[index].total)
        # A first token none of whose prefixes stands out keeps its best: the row may be weak, not the text false.
        counts = Counter({made[index].root: constants().beam for index in kept})
        for index in order if int(pairs[0, 0]) >= 0 else []:
            if counts[made[index].root] < constants().beam:
                counts[made[index].root] += 1
                kept.add(index)
        return self._unlike([index for index in order if index in kept], made)[: constants().widest]

    def _unlike(self, order: list[int], made: list[_Row]) -> list[int]:
        """Of rows in their order those that do not end like a better one: copies with a wrong token further back."""
        ends: set[tuple[int, ...]] = set()
        unlike = []
        for index in order:
            end = self._end(made[index])
            if len(end) < constants().alike or end not in ends:
                unlike.append(index)
                ends.add(end)
        return unlike

    def _end(self, row: _Row) -> tuple[int, ...]:
        """The last tokens up to a row, the last first."""
        end = [row.token]
        while len(end) < constants().alike and row.parent is not None:
            row = self.rows[row.parent]
            end.append(row.token)
        return tuple(end)

    @staticmethod
    def _needed(tried: int, alarms: float | None = None) -> float:
        """The evidence that chance gives so many pairs too rarely to matter."""
        return chance_quantile(min(0.3, (constants().garbage if alarms is None else alarms) / tried))

    def _path(self, index: int) -> list[int]:
        """A row and those before it, the first first."""
        path, step = [], index
        while True:
            path.append(step)
            before = self.rows[step].parent
            if before is None:
                return path[::-1]
            step = before

    def _unexplained(self) -> list[int]:
        """Last rows of the texts that have rows of their own, the best text first."""
        strong = [index for index, row in enumerate(self.rows) if not row.weak]
        inner = {step for index in strong for step in self._path(index)[:-1]}
        leaves = {self._ended(index): index for index in strong if index not in inner}
        ends = sorted(leaves, key=lambda index: -self.rows[index].total)
        explained: set[tuple[int, int]] = set()
        chosen = []
        for end in ends:
            own = [self.rows[step] for step in self._path(end)]
            gain = sum(row.evidence for row in own if (row.position, row.token) not in explained)
            if gain >= constants().own_rows * self._needed(len(self.candidates.distinct())):
                chosen.append(leaves[end] if self.told else end)
                explained |= {(row.position, row.token) for row in own}
        return chosen

    def _ended(self, index: int) -> int:
        """Where the text of a row ends: behind it, rows fit far worse than usual in it."""
        path = self._path(index)
        usually = statistics.median(self.rows[step].evidence for step in path)
        while len(path) > 1 and self.rows[path[-1]].evidence < constants().ending * usually:
            path.pop()
        return path[-1]

    def _tree(self, ends: list[int]) -> Tree:
        """The prefixes of some texts as a tree; a text's ratio is what chance explains of its mean evidence."""
        tree, nodes = Tree(), dict[int, int]()
        wanted = {step for end in ends for step in self._path(end)}
        needed = self._needed(len(self.candidates.distinct()))
        for index in sorted(wanted):
            row = self.rows[index]
            parent = None if row.parent is None else nodes[row.parent]
            nodes[index] = tree.grow(
                parent,
                row.token,
                start=0,
                ratio=needed / max(row.evidence, 1e-3),
                rotary=self.ranking.block.rotary,
            )
        return tree


def _best_of_each(places: Int[Tensor, " pairs"], evidence: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """For each pair the best evidence among those of its prefix."""
    best = evidence.new_full((int(places.max()) + 2,), -torch.inf)
    return best.scatter_reduce(0, places + 1, evidence, "amax")[places + 1]
