"""Where no gap stands below the signal: a beam for each beginning, and texts that others explain taken out.

Chapter `12_federated`.

A beam over all prefixes collapses to the copies of one strong text. So every beginning keeps its best prefixes, by the
evidence along them, whatever others have, until the last block shows that its text has ended; and of the texts that
come out, one that differs from a better one in a few tokens is explained by it: only rows that no better text has
count for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.explained import unexplained
from dager_tutorial.server.decoder.last_block import LastBlock
from dager_tutorial.server.decoder.mending import Mended, Mender
from dager_tutorial.server.decoder.passage import Cache, Rows
from dager_tutorial.server.decoder.paths import Paths, Row, ending_apart, repeats, said_again, shared
from dager_tutorial.server.decoder.ranking import Ranking, near_best
from dager_tutorial.server.decoder.rivals import going_on
from dager_tutorial.server.decoder.seen_ends import SeenEnds
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.odds import chance_quantile
from dager_tutorial.server.token_filter import Candidates


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
    """Grows the beams of all beginnings together.

    Attributes:
        candidates: Tokens that may stand at each position.
        last: Tells where texts end: nothing is sought behind.
        budget: What it may cost.
        ranking: Weighs extensions.
        paths: All rows that were ever kept.
        usually: The evidence of a row in the usual text, at the position where it was most.
        ends: Rows at which texts end by the last block.
        texts: Last rows of the texts that nothing better explains.
        known: Texts of earlier runs whose ends the last block sees.
        common: With how many tokens another text may begin as one of them does.
    """

    candidates: Candidates
    last: LastBlock
    budget: Budget
    ranking: Ranking = field(init=False)
    paths: Paths = field(default_factory=Paths)
    usually: float = 0.0
    ends: SeenEnds = field(default_factory=SeenEnds)
    texts: list[int] = field(default_factory=list)
    known: list[tuple[int, ...]] = field(default_factory=list)
    common: int = 0

    @torch.no_grad()
    def run(self, ranking: Ranking) -> None:
        """Grow until no beam has stood out for a while; of earlier runs the texts stay whose ends the last block sees.

        Args:
            ranking: Weighs extensions.
        """
        self.ranking = ranking
        self.known = [self.paths.tokens(end) for end in self.texts if end in self.ends]
        self.usually = self._usual() if ranking.rotary else 0.0  # of learned positions, earlier runs had other taps
        before = {end for end in self.texts if end not in self.ends and ranking.rotary}
        self._forget()
        self.common = max(len(self.candidates.prompt), shared(self.known)) + constants().alike
        front = _Front((), ranking.passage.empty())
        for position in range(ranking.passage.adapter.max_positions):
            tokens = self.candidates.at(position)
            if not len(tokens) or self.budget.late or (position and not front.nodes):
                break
            front = self._grown(front, position, tokens)
            self.budget.report("search", len(self.paths.rows))
        self.texts = self._unexplained(before)
        self.ends.doubt(self.texts, constants().end_misfit)
        self.texts = self._strong(self.texts)

    def mend(self, mender: Mender) -> bool:
        """Put mended texts in the places of those that fit worse, and drop what hardly is a text.

        Args:
            mender: Mends texts.

        Returns:
            Whether the last block tells where each of the texts ends.
        """
        mended = mender.mended([self.paths.tokens(end) for end in self.texts], self.ends.limits(self.texts))
        different: dict[tuple[int, ...], int] = {}
        for end in map(self._replaced, self.texts, mended):
            different.setdefault(self.paths.tokens(end), end)
        self.texts = [end for text, end in different.items() if end in self.ends or not repeats(text)]
        self.ends.doubt(self.texts)
        # Where a text that may be wrong ends as another one does, its search ran into that text's tail.
        own = {different[text] for text in ending_apart(different)}
        self.ends.keep([end for end in self.texts if end in own or end not in self.ends.doubted])
        return not self.untold

    def _replaced(self, end: int, mended: Mended) -> int:
        """Last row of what was mended, which may be the text itself."""
        if mended.text != self.paths.tokens(end):
            end = self.paths.replaced(end, mended.text)
        if mended.told or mended.misfit <= self.ends.limits(self.texts).seen:
            self.ends.add(end, mended.misfit, told=mended.told)
        return end

    def _strong(self, ends: Iterable[int]) -> list[int]:
        """Those of some last rows whose texts have not far weaker rows than the texts that are told."""
        least = constants().weak_text * self._usual()
        return [end for end in ends if self.paths.mean(end) >= least]

    def _usual(self) -> float:
        """The mean evidence of a row in the usual text of those whose ends are told."""
        return statistics.median([self.paths.mean(end) for end in self.ends.told(self.texts)] or [0.0])

    @property
    def tree(self) -> Tree:
        """The texts that nothing better explains."""
        return self._grafted(self.texts)[0]

    @property
    def told(self) -> list[tuple[int, ...]]:
        """Those of them whose ends the last block tells."""
        return [self.paths.tokens(end) for end in self.ends.told(self.texts)]

    @property
    def untold(self) -> list[tuple[int, ...]]:
        """The others."""
        told = set(self.ends.told(self.texts))
        return [self.paths.tokens(end) for end in self.texts if end not in told]

    def _forget(self) -> None:
        """Leave nothing but the texts whose ends the last block sees."""
        self.ends.keep(self.texts)
        kept = {step for end in self.ends for step in self.paths.path(end)}
        self.paths.rows = [
            row if index in kept else replace(row, strong=False) for index, row in enumerate(self.paths.rows)
        ]

    def _grown(self, front: _Front, position: int, tokens: Int[Tensor, " candidates"]) -> _Front:
        """The front one token longer."""
        chance = self.ranking.chance(front.cache, position)
        roots = [self.paths.rows[node].root[0] for node in front.nodes]
        begun = torch.tensor(roots, dtype=torch.long, device=tokens.device)
        extended = self.ranking.promising(front.cache, begun, position, tokens, chance)
        misfits = self.ranking.misfits(extended)
        evidence = self._new(front, extended, chance.evidence(misfits))
        outstanding = evidence >= self._needed(len(evidence))
        if bool(outstanding.any()):
            self.ranking.worth.learn(chance.deviating(misfits[outstanding]))
        made = [
            self._row(front, position, len(tokens), *each)
            for each in zip(extended.places.tolist(), extended.tokens.tolist(), evidence.tolist(), strict=True)
        ]
        kept = self._kept(extended.places, evidence, made)
        kept = [index for index in kept if made[index].weak <= constants().weak_rows and not self._known(made[index])]
        nodes = range(len(self.paths.rows), len(self.paths.rows) + len(kept))
        self.paths.rows += [made[index] for index in kept]
        alive = set(nodes)
        if (position + 1) % constants().ends_every == 0:
            alive = self._own(alive - self._over(list(nodes)))
        going = [(node, index) for node, index in zip(nodes, kept, strict=True) if node in alive]
        chosen = torch.tensor([index for _, index in going], dtype=torch.long, device=tokens.device)
        return _Front(tuple(node for node, _ in going), self.ranking.passage.grown(front.cache, extended.take(chosen)))

    def _new(self, front: _Front, rows: Rows, evidence: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The evidence, little of it where a text goes over its own words, or a known one's, and no place is told."""
        if not self.ranking.rotary:
            return evidence
        begun = [self.paths.tokens(node) for node in front.nodes] or [()]
        again = said_again(begun, rows.places.tolist(), rows.tokens.tolist(), self.known)
        return torch.where(torch.tensor(again, device=evidence.device), constants().again * evidence, evidence)

    def _known(self, row: Row) -> bool:
        """Whether a prefix is one of a text that an earlier run told, beyond what several texts may begin with."""
        text = self.paths.text(row)
        return len(text) > self.common and any(known[: len(text)] == text for known in self.known)

    def _over(self, nodes: list[int]) -> set[int]:
        """Those last rows of prefixes in which a text has surely ended; what lies behind its end stands out no more."""
        tree, places = self._grafted(nodes)
        rows = {place: row for row, place in places.items()}
        found, limits = self.last.ends(tree, [places[node] for node in nodes]), self.ends.limits(self.texts)
        over = {
            node: found[place]
            for node in nodes
            if (place := places[node]) in found and found[place].misfit <= max(limits)
        }
        for node, end in over.items():
            row = rows[end.node]
            self.ends.add(row, end.misfit, told=end.misfit <= limits.told)
            for step in self.paths.path(node):
                if step >= row:
                    self.paths.rows[step] = replace(self.paths.rows[step], strong=step == row)
        return set(over)

    def _row(self, front: _Front, position: int, tried: int, place: int, token: int, evidence: float) -> Row:
        """The row of an extension."""
        if not front.nodes:
            return Row(None, token, (token,), position, evidence, evidence, strong=True, weak=0, doubtful=False)
        before, prompted = self.paths.rows[front.nodes[place]], len(self.candidates.prompt)
        needed = max(self._needed(tried), constants().ending * self.paths.usual(front.nodes[place]))
        strong = position < prompted or evidence >= needed
        weak, doubtful = max(0, before.weak - 1) if strong else before.weak + 1, not strong or before.doubtful
        root = before.root if position > prompted else (token,)  # a prompt is not the text's own
        if position - prompted in (constants().first_tokens, constants().beginning):
            root = self.paths.tokens(front.nodes[place])[prompted:]
        return Row(front.nodes[place], token, root, position, evidence, before.total + evidence, strong, weak, doubtful)

    def _kept(self, places: Int[Tensor, " rows"], evidence: Float[Tensor, " rows"], made: list[Row]) -> list[int]:
        """Indices of the rows that go on."""
        begins, position = made[0].parent is None, made[0].position
        needed = self._needed(len(made), 1.0 if begins else constants().false_alarms)
        share = constants().beside_second if position == len(self.candidates.prompt) + 1 else constants().beside_best
        beside = torch.ones_like(evidence, dtype=torch.bool) if begins else near_best(places, evidence, share)
        rivals = ((evidence >= needed) & beside).nonzero()[:, 0].tolist()
        kept = {index for index in rivals if not made[index].doubtful}
        order = sorted(beside.nonzero()[:, 0].tolist(), key=lambda index: -made[index].total)
        best = {made[index].root: made[index].total for index in reversed(order)}
        self.usually = max(self.usually, statistics.median(best.values()) / (position + 1))
        least = constants().beside_others * self.usually * (position + 1)
        order = [index for index in order if begins or made[index].total >= least]
        return going_on(self.paths, made, order, kept, self.known)[: constants().widest]

    @staticmethod
    def _needed(tried: int, alarms: float | None = None) -> float:
        """The evidence that chance gives so many pairs too rarely to matter."""
        return chance_quantile(min(0.3, (constants().garbage if alarms is None else alarms) / tried))

    def _unexplained(self, before: set[int]) -> list[int]:
        """Last rows of texts, some from before, that have rows of their own, the best first; weak ones explain none."""
        self._over([leaf for leaf in self._strong(self._leaves()) if leaf not in self.ends])
        ends = self._strong(before | {self._ended(index) for index in self._leaves()})
        return self._with_own_rows(ends, least=constants().own_rows * self._needed(len(self.candidates.distinct())))

    def _own(self, nodes: set[int]) -> set[int]:
        """Those of some last rows whose beginning has one with rows of its own, beside those of far better texts."""
        best = {self.paths.rows[node].root: node for node in sorted(nodes, key=self._worth)}
        own = self._with_own_rows({*best.values(), *self.ends}, clearly=constants().far_better)
        roots = {self.paths.rows[index].root for index in own}
        return {node for node in nodes if self.paths.rows[node].root in roots}

    def _with_own_rows(self, ends: Iterable[int], **needed: float) -> list[int]:
        """Those of some last rows whose texts better ones do not explain, the best first."""
        order, prompted = sorted(ends, key=self._worth, reverse=True), len(self.candidates.prompt)
        return unexplained(self.paths, order, rotary=self.ranking.rotary, prompted=prompted, **needed)

    def _worth(self, index: int) -> float:
        """The evidence of a text, of which one that may have run on beyond its end is worth less."""
        return self.paths.rows[index].total * (1.0 if index in self.ends else constants().unended)

    def _leaves(self) -> list[int]:
        """Rows behind which none stands out, and those at which texts end."""
        strong = [index for index, row in enumerate(self.paths.rows) if row.strong]
        inner = {step for index in strong for step in self.paths.path(index)[:-1]}
        return [index for index in strong if index not in inner or index in self.ends]

    def _ended(self, index: int) -> int:
        """Where the text of a row ends: behind it, rows fit far worse than usual in it."""
        path, least = self.paths.path(index), constants().ending * self.paths.usual(index)
        while len(path) > 1 and path[-1] not in self.ends and self.paths.rows[path[-1]].evidence < least:
            path.pop()
        return path[-1]

    def _grafted(self, ends: list[int]) -> tuple[Tree, dict[int, int]]:
        """The prefixes of some texts as a tree, and its node of each row.

        A text's ratio is what chance explains of its mean evidence.
        """
        tree, nodes = Tree(), dict[int, int]()
        wanted = {step for end in ends for step in self.paths.path(end)}
        needed = self._needed(len(self.candidates.distinct()))
        for index in sorted(wanted):
            row = self.paths.rows[index]
            parent = None if row.parent is None else nodes[row.parent]
            ratio = needed / max(row.evidence, 1e-3)
            nodes[index] = tree.grow(parent, row.token, start=0, ratio=ratio, rotary=self.ranking.rotary)
        return tree, nodes
