"""Where no gap stands below the signal: a beam for each first token, and texts that others explain taken out.

Chapter `12_federated`.

A beam over all prefixes collapses to the copies of one strong text. So every first token keeps its best prefixes, by
the evidence along them, whatever others have, until the last block shows that its text has ended; and of the texts
that come out, one that differs from a better one in a few tokens is explained by it: only rows that no better text has
count for it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.last_block import LastBlock
from dager_tutorial.server.decoder.passage import Cache
from dager_tutorial.server.decoder.ranking import Ranking, near_best
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.odds import chance_quantile
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
        strong: Whether it stands out.
        weak: By how many more rows than stand out did not, since they last were even.
        doubtful: Whether this row or one before it did not stand out.
    """

    parent: int | None
    token: int
    root: int
    position: int
    evidence: float
    total: float
    strong: bool
    weak: int
    doubtful: bool


@dataclass(frozen=True)
class _Front:
    """Prefixes of one length.

    Attributes:
        nodes: Their last rows, by index; none before the first token, when the cache is of one empty prefix.
        cache: Their keys and values.
    """

    nodes: tuple[int, ...]
    cache: Cache


@dataclass
class BeamSearch:
    """Grows the beams of all first tokens together.

    Attributes:
        candidates: Tokens that may stand at each position.
        last: Tells where texts end: nothing is sought behind.
        budget: What it may cost.
        ranking: Weighs extensions.
        rows: All rows that were ever kept, parents before children.
        usually: The evidence of a row in the usual text, at the position where it was most.
        ends: Rows at which texts end by the last block, and how badly they fit there.
        texts: Last rows of the texts that nothing better explains.
    """

    candidates: Candidates
    last: LastBlock
    budget: Budget
    ranking: Ranking = field(init=False)
    rows: list[_Row] = field(default_factory=list)
    usually: float = 0.0
    ends: dict[int, float] = field(default_factory=dict)
    texts: list[int] = field(default_factory=list)

    @torch.no_grad()
    def run(self, ranking: Ranking) -> bool:
        """Grow until no beam has stood out for a while; of earlier runs the texts stay whose ends the last block tells.

        Args:
            ranking: Weighs extensions.

        Returns:
            Whether the last block tells where each of the texts ends.
        """
        self.ranking, self.usually = ranking, 0.0
        self._forget()
        front = _Front((), ranking.passage.empty())
        for position in range(ranking.passage.adapter.max_positions):
            tokens = self.candidates.at(position)
            if not len(tokens) or self.budget.late or (position and not front.nodes):
                break
            front = self._grown(front, position, tokens)
            self.budget.report("search", len(self.rows))
        self.texts = self._unexplained()
        return all(end in self.ends for end in self.texts)

    @property
    def tree(self) -> Tree:
        """The texts that nothing better explains."""
        return self._grafted(self.texts)[0]

    @property
    def told(self) -> list[tuple[int, ...]]:
        """Those of them whose ends the last block tells."""
        return [tuple(self._tokens(end)) for end in self.texts if end in self.ends]

    def _forget(self) -> None:
        """Leave nothing but the texts whose ends the last block tells."""
        self.ends = {end: self.ends[end] for end in self.texts if end in self.ends}
        kept = {step for end in self.ends for step in self._path(end)}
        self.rows = [row if index in kept else replace(row, strong=False) for index, row in enumerate(self.rows)]

    def _grown(self, front: _Front, position: int, tokens: Int[Tensor, " candidates"]) -> _Front:
        """The front one token longer."""
        chance = self.ranking.chance(front.cache, position)
        begun = torch.tensor([self.rows[node].root for node in front.nodes], dtype=torch.long, device=tokens.device)
        extended = self.ranking.promising(front.cache, begun, position, tokens, chance)
        misfits = self.ranking.misfits(extended)
        evidence = chance.evidence(misfits)
        outstanding = evidence >= self._needed(len(evidence))
        if bool(outstanding.any()):
            self.ranking.worth.learn(chance.deviating(misfits[outstanding]))
        made = [
            self._row(front, position, len(tokens), *each)
            for each in zip(extended.places.tolist(), extended.tokens.tolist(), evidence.tolist(), strict=True)
        ]
        kept = self._kept(extended.places, evidence, made)
        kept = [index for index in kept if made[index].weak <= constants().weak_rows]
        nodes = range(len(self.rows), len(self.rows) + len(kept))
        self.rows += [made[index] for index in kept]
        ended = self._over(list(nodes)) if (position + 1) % constants().ends_every == 0 else set()
        going = [(node, index) for node, index in zip(nodes, kept, strict=True) if node not in ended]
        chosen = torch.tensor([index for _, index in going], dtype=torch.long, device=tokens.device)
        return _Front(tuple(node for node, _ in going), self.ranking.passage.grown(front.cache, extended.take(chosen)))

    def _over(self, nodes: list[int]) -> set[int]:
        """Those last rows of prefixes in which a text has surely ended; what lies behind its end stands out no more."""
        tree, places = self._grafted(nodes)
        rows = {place: row for row, place in places.items()}
        found = self.last.ends(tree, [places[node] for node in nodes])
        over = {node: found[places[node]] for node in nodes if places[node] in found}
        for node, end in over.items():
            row = rows[end.node]
            self.ends[row] = end.misfit
            for step in self._path(node):
                if step >= row:
                    self.rows[step] = replace(self.rows[step], strong=step == row)
        return set(over)

    def _row(self, front: _Front, position: int, tried: int, place: int, token: int, evidence: float) -> _Row:
        """The row of an extension."""
        if not front.nodes:
            return _Row(None, token, token, position, evidence, evidence, strong=True, weak=0, doubtful=False)
        before, prompted = self.rows[front.nodes[place]], len(self.candidates.prompt)
        needed = max(self._needed(tried), constants().ending * self._usual(front.nodes[place]))
        strong = position < prompted or evidence >= needed
        weak, doubtful = max(0, before.weak - 1) if strong else before.weak + 1, not strong or before.doubtful
        root = token if position == prompted else before.root  # a prompt is the first token of all
        total = before.total + evidence
        return _Row(front.nodes[place], token, root, position, evidence, total, strong, weak, doubtful)

    def _kept(self, places: Int[Tensor, " rows"], evidence: Float[Tensor, " rows"], made: list[_Row]) -> list[int]:
        """Rows of prefixes that stood out throughout and rival their siblings, and the best of each first token."""
        begins = made[0].parent is None
        needed = self._needed(len(made), 1.0 if begins else constants().false_alarms)
        beside = torch.ones_like(evidence, dtype=torch.bool) if begins else near_best(places, evidence)
        rivals = (evidence >= needed) & beside
        kept = {index for index in rivals.nonzero()[:, 0].tolist() if not made[index].doubtful}
        order = sorted(beside.nonzero()[:, 0].tolist(), key=lambda index: -made[index].total)
        best: dict[int, float] = {}
        for index in order:
            best.setdefault(made[index].root, made[index].total)
        self.usually = max(self.usually, statistics.median(best.values()) / (made[0].position + 1))
        least = constants().beside_others * self.usually * (made[0].position + 1)
        chosen, counts = [], Counter[int]()
        for index in self._unlike([index for index in order if begins or made[index].total >= least], made):
            # A first token none of whose prefixes stands out keeps its best: the row may be weak, not the text false.
            most = constants().widest_beam if index in kept else 0 if begins else constants().beam
            if counts[made[index].root] < most:
                counts[made[index].root] += 1
                chosen.append(index)
        return chosen[: constants().widest]

    def _unlike(self, order: list[int], made: list[_Row]) -> list[int]:
        """Of rows in their order those that end in a way of their own, and the best of every first token.

        One that ends like a better one of its first token is a copy with a wrong token further back, one that ends like
        that of another text is that text's rows behind its own end; one that ends like itself before goes round in a
        circle, whose rows are alike at every turn.
        """
        best: dict[tuple[int, ...], int] = {}
        first: dict[int, int] = {}
        alike = constants().alike
        for index in order:
            row = made[index]
            text = (*self._tokens(row.parent), row.token)
            end = text[-alike:]
            if len(text) > alike and any(text[at : at + alike] == end for at in range(len(text) - alike)):
                continue
            first.setdefault(row.root, index)
            rival = best.setdefault(end if len(text) >= alike else text, index)
            if made[rival].root != row.root and self._recent(made[rival]) < self._recent(row):
                best[end] = index
        unlike = {*best.values(), *first.values()}
        return [index for index in order if index in unlike]

    def _recent(self, row: _Row) -> float:
        """The evidence of a text's last rows."""
        before = [] if row.parent is None else self._path(row.parent)[1 - constants().alike :]
        return row.evidence + sum(self.rows[step].evidence for step in before)

    def _tokens(self, index: int | None) -> list[int]:
        """The tokens up to a row."""
        return [] if index is None else [self.rows[step].token for step in self._path(index)]

    @staticmethod
    def _needed(tried: int, alarms: float | None = None) -> float:
        """The evidence that chance gives so many pairs too rarely to matter."""
        return chance_quantile(min(0.3, (constants().garbage if alarms is None else alarms) / tried))

    def _path(self, index: int) -> list[int]:
        """A row and those before it, the first first."""
        path: list[int] = []
        step: int | None = index
        while step is not None:
            path.append(step)
            step = self.rows[step].parent
        return path[::-1]

    def _unexplained(self) -> list[int]:
        """Last rows of the texts that have rows of their own, the best text first, by the last block where it tells."""
        self._over([leaf for leaf in self._leaves() if leaf not in self.ends])
        leaves = {self._ended(index) for index in self._leaves()}
        ends = sorted(leaves, key=lambda index: (self.ends.get(index, math.inf), -self.rows[index].total))
        explained: set[tuple[int | None, int]] = set()
        chosen = []
        for end in ends:
            own = [self.rows[step] for step in self._path(end)]
            pairs = list(zip([None, *(row.token for row in own)], own, strict=False))
            gain = sum(row.evidence for before, row in pairs if (before, row.token) not in explained)
            enough = constants().own_rows * self._needed(len(self.candidates.distinct()))
            if gain >= max(enough, constants().own_share * self.rows[end].total):
                chosen.append(end)
                explained |= {(before, row.token) for before, row in pairs}
        return chosen

    def _leaves(self) -> list[int]:
        """Rows behind which none stands out, and those at which texts end."""
        strong = [index for index, row in enumerate(self.rows) if row.strong]
        inner = {step for index in strong for step in self._path(index)[:-1]}
        return [index for index in strong if index not in inner or index in self.ends]

    def _ended(self, index: int) -> int:
        """Where the text of a row ends: behind it, rows fit far worse than usual in it."""
        path, least = self._path(index), constants().ending * self._usual(index)
        while len(path) > 1 and path[-1] not in self.ends and self.rows[path[-1]].evidence < least:
            path.pop()
        return path[-1]

    def _usual(self, index: int) -> float:
        """The evidence of a usual row up to one."""
        return statistics.median(self.rows[step].evidence for step in self._path(index))

    def _grafted(self, ends: list[int]) -> tuple[Tree, dict[int, int]]:
        """The prefixes of some texts as a tree, and its node of each row.

        A text's ratio is what chance explains of its mean evidence.
        """
        tree, nodes = Tree(), dict[int, int]()
        wanted = {step for end in ends for step in self._path(end)}
        needed = self._needed(len(self.candidates.distinct()))
        for index in sorted(wanted):
            row = self.rows[index]
            parent = None if row.parent is None else nodes[row.parent]
            ratio = needed / max(row.evidence, 1e-3)
            nodes[index] = tree.grow(parent, row.token, start=0, ratio=ratio, rotary=self.ranking.rotary)
        return tree, nodes
