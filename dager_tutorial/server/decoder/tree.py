"""Decoder recovery: grow the tree of prefixes, one position at a time (chapter 4).

In a causal model a token's state depends on its prefix only, so that prefixes can be confirmed from left to right. A
prefix with one more token is tried by a cascade of span tests, cheapest first: the input of block 0's attention output
map (no MLP needed, decided on a few directions of the complement), the input of block 0's MLP, then block 1's queries,
keys and values. Keys and values of accepted prefixes are kept, so that nothing is computed twice.

With rotary positions a first token repeated ([A], [A, A], ...) has the same state at every length, so that every length
passes. Such chains are put aside and followed afterwards, and only while the gradient holds something unexplained.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.server.rounding import attend
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates

SCREEN_DIRECTIONS = 32
# How far a repeated first token is followed: while a clear rank says that rows are missing, and where none does.
LONGEST_REPEAT, LONGEST_REPEAT_IN_NOISE = 512, 16


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
    """All confirmed prefixes, shorter ones first."""

    nodes: list[Node] = field(default_factory=list)

    def leaves(self) -> list[int]:
        """Indices of prefixes that no other confirmed prefix extends; chains of repeats that lead nowhere left out."""
        useful = self._useful()
        parents = {node.parent for index, node in enumerate(self.nodes) if index in useful}
        return [index for index in sorted(useful) if index not in parents]

    def real(self) -> list[int]:
        """Indices of prefixes that stand for a row of their own."""
        return sorted(self._useful())

    def _useful(self) -> set[int]:
        useful: set[int] = set()
        for index, node in enumerate(self.nodes):
            if node.repeats:
                continue
            step: int | None = index
            while step is not None and step not in useful:
                useful.add(step)
                step = self.nodes[step].parent
        return useful

    def distinct_rows(self) -> int:
        """How many different rows the prefixes stand for: a chain of repeats is one."""
        return sum(not node.repeats for node in self.nodes)


@dataclass
class Front:
    """Prefixes of one length, with what is cached of their tokens in block 0.

    Attributes:
        nodes: Their indices in the tree.
        starts: int64, prefixes: position of each first token.
        keys: float32, prefixes x length x key heads x width.
        values: Like `keys`.
        seen: float32, prefixes x length x heads x directions: the values' contributions to the screening directions.
    """

    nodes: list[int]
    starts: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    def take(self, places: list[int]) -> Front:
        """The front of some of its prefixes."""
        rows = torch.tensor(places, dtype=torch.long, device=self.keys.device)
        nodes = [self.nodes[place] for place in places]
        return Front(nodes, self.starts[rows], self.keys[rows], self.values[rows], self.seen[rows])


@dataclass(frozen=True)
class Extension:
    """All candidates of one position, as block 0 sees them.

    Attributes:
        position: The position.
        tokens: int64, candidates.
        hidden: float32, candidates x hidden size, before block 0.
        query: float32, candidates x heads x width.
        key: float32, candidates x key heads x width.
        value: Like `key`.
        seen: float32, candidates x heads x directions: the value's contribution to the screening directions.
    """

    position: int
    tokens: Tensor
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor


class TreeSearch(ABC):
    """Grows a tree of prefixes; which extensions are kept is what subclasses decide.

    Args:
        adapter: The architecture.
        candidates: Tokens that may stand at each position.
        directions: float32, (heads * width) x directions, on which values are screened.
        expected_rows: The number of distinct prefixes, where a clear rank tells it, else None.
        widest: How many prefixes of one length are kept at most; the best are.
        memory: Bytes that intermediate results may take.
        deadline: Value of `time.perf_counter` after which the search stops, or None.
        progress: Called with the number of prefixes confirmed so far and the expected number, or None.
    """

    def __init__(
        self,
        adapter: DecoderAdapter,
        candidates: Candidates,
        directions: Tensor,
        *,
        expected_rows: int | None,
        widest: int,
        memory: int,
        deadline: float | None,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.adapter, self.candidates, self.memory = adapter, candidates, memory
        self.expected_rows, self.deadline, self.progress = expected_rows, deadline, progress
        self.widest = widest
        self.rotary = candidates.every_position
        self.overflowed = False  # more extensions passed at one length than there can be
        self.tree = Tree()
        self.directions = directions.unflatten(0, (adapter.num_heads, adapter.head_width))

    @abstractmethod
    def select(self, front: Front, extension: Extension) -> tuple[Tensor, Tensor]:
        """Choose extensions.

        Args:
            front: Prefixes of one length.
            extension: Candidates of the next position.

        Returns:
            Pairs (int64, count x 2: prefix, or -1 where a text begins; candidate) and their ratios (float32).
        """

    stop_at_overflow = False

    @property
    def late(self) -> bool:
        """True once the deadline has passed, or where going on makes no sense."""
        if self.stop_at_overflow and self.overflowed:
            return True
        return self.deadline is not None and time.perf_counter() > self.deadline

    @torch.no_grad()
    def run(self) -> Tree:
        """Grow until no prefix can be extended; then follow repeated first tokens if something is unexplained."""
        chains = self._grow(self._empty_front(), 0)
        position = 1
        while chains is not None and chains.nodes and position < self._longest_repeat() and not self._explained():
            position += 1
            chains = self._grow(chains, position)
        return self.tree

    def _explained(self) -> bool:
        return self.late or (self.expected_rows is not None and self.tree.distinct_rows() >= self.expected_rows)

    def _longest_repeat(self) -> int:
        limit = LONGEST_REPEAT if self.expected_rows is not None else LONGEST_REPEAT_IN_NOISE
        return min(limit, self.adapter.max_positions - 1)

    def _grow(self, front: Front, position: int) -> Front | None:
        """Grow a front from a position to the end; returns the repeats one token longer than the front, put aside."""
        aside: Front | None = None
        while position < self.adapter.max_positions and not self.late:
            if position and not front.nodes and (self.rotary or position >= len(self.candidates.tokens)):
                break
            grown = self._step(front, position)
            repeats = [place for place, node in enumerate(grown.nodes) if self.tree.nodes[node].repeats]
            if repeats:
                aside = grown.take(repeats) if aside is None else aside
                grown = grown.take([place for place in range(len(grown.nodes)) if place not in set(repeats)])
            front = grown
            position += 1
            if self.progress:
                self.progress(self.tree.distinct_rows(), self.expected_rows)
        return aside

    def _empty_front(self) -> Front:
        adapter = self.adapter
        device = adapter.first_input.tokens.device
        cache = torch.empty(0, 0, adapter.num_key_heads, adapter.head_width, device=device)
        seen = torch.empty(0, 0, adapter.num_heads, self.directions.shape[2], device=device)
        return Front([], torch.empty(0, dtype=torch.long, device=device), cache, cache, seen)

    def _extension(self, position: int, tokens: Tensor) -> Extension:
        adapter = self.adapter
        hidden = adapter.embed(tokens, position)
        query, key, value = adapter.project(0, adapter.attention_input(0, hidden), position)
        groups = adapter.num_heads // adapter.num_key_heads
        seen = torch.einsum("chw,hwn->chn", value.repeat_interleave(groups, 1), self.directions)
        return Extension(position, tokens, hidden, query, key, value, seen)

    def _step(self, front: Front, position: int) -> Front:
        """Extend every prefix by every candidate of a position, and begin new ones where texts may begin."""
        if not len(self.candidates.at(position)):
            return self._empty_front()
        extension = self._extension(position, self.candidates.at(position))
        pairs, ratios = self.select(front, extension)
        self.overflowed |= len(pairs) > self.widest
        best = ratios.argsort(stable=True)[: self.widest].sort().values
        return self._grown(front, extension, pairs[best], ratios[best])

    def _beginnings(self, extension: Extension) -> Tensor:
        """Pairs of no prefix (-1) and every candidate, where texts may begin at this position."""
        count = len(extension.tokens) if extension.position == 0 or not self.rotary else 0
        alone = torch.arange(count, device=extension.tokens.device)
        return torch.stack([torch.full_like(alone, -1), alone], 1)

    def _weights(self, front: Front, extension: Extension, places: Tensor) -> Tensor:
        """Attention of every pair (prefixes x candidates x key heads x groups x length + 1), its own key last."""
        adapter = self.adapter
        groups = adapter.num_heads // adapter.num_key_heads
        query = extension.query.unflatten(1, (adapter.num_key_heads, groups))
        scores = torch.einsum("ckgw,alkw->ackgl", query, front.keys[places])
        own = torch.einsum("ckgw,ckw->ckg", query, extension.key).expand(len(places), -1, -1, -1)
        weights = torch.cat([scores, own[..., None]], -1) * adapter.scaling(0)
        position = torch.arange(extension.position, device=weights.device)
        unseen = position < front.starts[places, None]
        window = adapter.window(0)
        if window is not None:
            unseen = unseen | (position <= extension.position - window)
        weights[..., :-1].masked_fill_(unseen[:, None, None, None], -math.inf)
        return weights.softmax(-1)

    def _attended(self, front: Front, extension: Extension, pairs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of the pairs: indices (int64) and inputs of block 0's attention output map (float32, rows x width)."""
        adapter = self.adapter
        rest = torch.arange(len(pairs), device=pairs.device)
        if len(pairs) and int(pairs[0, 0]) >= 0:
            # Where a prefix has many candidates left, its cache is not copied for each of them.
            crowded = 4 * pairs[:, 0].bincount(minlength=len(front.nodes)) >= len(extension.tokens)
            for place in crowded.nonzero()[:, 0]:
                if self.late:
                    return
                part = (pairs[:, 0] == place).nonzero()[:, 0]
                yield part, self._attended_by_all(front, extension, place[None])[0, pairs[part, 1]]
            rest = (~crowded[pairs[:, 0]]).nonzero()[:, 0]
        length = front.keys.shape[1] + 1
        entry = 4 * (4 * length * adapter.num_heads * adapter.head_width + 12 * adapter.hidden_size)
        for part in rest.split(max(1, self.memory // entry)):
            if self.late or not len(part):
                return
            place, choice = pairs[part].unbind(1)
            keys, values = extension.key[choice, None], extension.value[choice, None]
            starts = None
            if int(place[0]) >= 0:
                keys = torch.cat([front.keys[place], keys], 1)
                values = torch.cat([front.values[place], values], 1)
                starts = front.starts[place]
            yield part, attend(adapter, 0, extension.query[choice], keys, values, starts)

    def _attended_by_all(self, front: Front, extension: Extension, places: Tensor) -> Tensor:
        """Like `_attended` for every candidate after some prefixes (float32, prefixes x candidates x width)."""
        weights = self._weights(front, extension, places)
        attended = torch.einsum("ackgl,alkw->ackgw", weights[..., :-1], front.values[places])
        attended += torch.einsum("ackg,ckw->ackgw", weights[..., -1], extension.value)
        return attended.flatten(2)

    def _grown(self, front: Front, extension: Extension, pairs: Tensor, ratios: Tensor) -> Front:
        """Enter accepted pairs into the tree and build the next front."""
        if not len(pairs):
            return self._empty_front()
        place, choice = pairs.unbind(1)
        nodes = [
            self._enter(front, index, extension.position, token, ratio)
            for index, token, ratio in zip(
                place.tolist(), extension.tokens[choice].tolist(), ratios.tolist(), strict=True
            )
        ]
        starts = torch.full_like(place, extension.position)
        old = place >= 0
        starts[old] = front.starts[place[old]]

        def longer(past: Tensor, new: Tensor) -> Tensor:
            cache = new.new_zeros(len(pairs), extension.position + 1, *new.shape[1:])
            if bool(old.any()):
                cache[old, :-1] = past[place[old]]
            cache[:, -1] = new[choice]
            return cache

        keys, values = longer(front.keys, extension.key), longer(front.values, extension.value)
        return Front(nodes, starts, keys, values, longer(front.seen, extension.seen))

    def _enter(self, front: Front, place: int, position: int, token: int, ratio: float) -> int:
        if place < 0:
            node = Node((token,), position, ratio, None, repeats=False)
        else:
            parent = front.nodes[place]
            before = self.tree.nodes[parent]
            chain = self.rotary and before.tokens[0] == token and (before.repeats or len(before.tokens) == 1)
            node = Node((*before.tokens, token), before.start, max(ratio, before.ratio), parent, repeats=chain)
        self.tree.nodes.append(node)
        return len(self.tree.nodes) - 1


class PrefixSearch(TreeSearch):
    """Keeps the extensions whose vectors lie in the spans of one update, by a cascade of tests.

    Where more of them pass than the rank allows the tests have no power left, and the search stops: `overflowed`.

    Args:
        adapter: The architecture.
        spans: Spans of the taps (block, kind) that were shared.
        candidates: Tokens that may stand at each position.
        expected_rows: The number of distinct prefixes, where a clear rank tells it, else None.
        memory: Bytes that intermediate results may take.
        deadline: Value of `time.perf_counter` after which the search stops, or None.
        seed: Seed of the screening directions.
        progress: Called with the number of prefixes confirmed so far and the expected number, or None.
    """

    stop_at_overflow = True

    def __init__(
        self,
        adapter: DecoderAdapter,
        spans: Mapping[tuple[int, str], Span],
        candidates: Candidates,
        *,
        expected_rows: int | None,
        memory: int,
        deadline: float | None = None,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.attention = spans.get((0, ATTENTION_OUTPUT))
        self.mlp = spans.get((0, MLP))
        self.next_block = spans.get((1, QKV)) if adapter.num_blocks > 1 else None
        directions = torch.zeros(adapter.num_heads * adapter.head_width, 0, device=adapter.first_input.tokens.device)
        if self.attention is not None:
            directions = self.attention.screen(SCREEN_DIRECTIONS, torch.Generator().manual_seed(seed))
        super().__init__(
            adapter,
            candidates,
            directions,
            expected_rows=expected_rows,
            # Different rows of one length are independent, so that more than the rank cannot be true.
            widest=max((span.rank for span in spans.values()), default=adapter.hidden_size),
            memory=memory,
            deadline=deadline,
            progress=progress,
        )

    def select(self, front: Front, extension: Extension) -> tuple[Tensor, Tensor]:
        """Choose the extensions that pass every span test."""
        passed = [self._confirm(front, extension, self._beginnings(extension))]
        if front.nodes:
            passed.append(self._confirm(front, extension, self._screened(front, extension)))
        pairs, ratios = zip(*passed, strict=True)
        return torch.cat(pairs), torch.cat(ratios)

    def _screened(self, front: Front, extension: Extension) -> Tensor:
        """Pairs (count x 2, int64: prefix, candidate) whose attention output may lie in the span."""
        everyone = torch.ones(len(front.nodes), len(extension.tokens), dtype=torch.bool, device=front.keys.device)
        if self.attention is not None:
            largest = max(
                front.values.square().sum((2, 3)).max().item(),
                extension.value.square().sum((1, 2)).max().item(),
            )
            largest *= self.adapter.num_heads // self.adapter.num_key_heads
            limit = 4 * self.attention.worst**2 * largest
            length = front.keys.shape[1] + 1
            entry = 12 * self.adapter.num_heads * len(extension.tokens) * length
            for places in torch.arange(len(front.nodes), device=front.keys.device).split(max(1, self.memory // entry)):
                everyone[places] = self._residuals(front, extension, places) <= limit
        return everyone.nonzero()

    def _residuals(self, front: Front, extension: Extension, places: Tensor) -> Tensor:
        """Squared screened residuals (prefixes x candidates, float32) of the attention output of every pair."""
        weights = self._weights(front, extension, places).flatten(2, 3)
        mixed = weights[..., :-1].flatten(2) @ front.seen[places].transpose(1, 2).flatten(1, 2)
        mixed += torch.einsum("ach,chn->acn", weights[..., -1], extension.seen)
        return mixed.square().sum(2)

    def _confirm(self, front: Front, extension: Extension, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Run the cascade exactly on pairs; returns those that pass and their ratios."""
        kept, ratios = [pairs[:0]], [torch.empty(0, device=pairs.device)]
        for part, attended in self._attended(front, extension, pairs):
            passed, ratio = self._cascade(extension.hidden[pairs[part, 1]], attended)
            kept.append(pairs[part[passed]])
            ratios.append(ratio)
        return torch.cat(kept), torch.cat(ratios)

    def _cascade(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (int64) of the rows that pass every test that can be made, and their largest ratios (float32)."""
        adapter = self.adapter
        passed = torch.arange(len(hidden), device=hidden.device)
        worst = torch.zeros(len(hidden), device=hidden.device)

        def test(span: Span | None, vectors: Tensor) -> None:
            nonlocal passed, worst, hidden
            if span is None:
                return
            ratio = span.ratio(vectors)
            good = ratio <= span.bound
            passed, hidden, worst = passed[good], hidden[good], torch.maximum(worst, ratio)[good]

        test(self.attention, attended)
        hidden = adapter.after_attention(0, hidden, attended[passed])
        inner = adapter.mlp_input(0, hidden)
        before = passed
        test(self.mlp, inner)
        if self.next_block is not None:
            hidden = adapter.after_mlp(0, hidden, inner[torch.isin(before, passed)])
            test(self.next_block, adapter.attention_input(1, hidden))
        return passed, worst
