"""Decoder recovery: grow the tree of prefixes, one position at a time (chapter 4).

In a causal model a token's state depends on its prefix only, so that prefixes can be confirmed from left to right. A
prefix with one more token is tried by a cascade of span tests, cheapest first: the input of block 0's attention output
map (no MLP needed, decided on a few directions of the complement), the input of block 0's MLP, then block 1's queries,
keys and values. Keys and values of accepted prefixes are kept, so that nothing is computed twice.

With rotary positions a first token repeated ([A], [A, A], ...) has the same state at every length. Such a chain is
followed only while the gradient still holds something unexplained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .models.base import ATTENTION_OUTPUT, MLP, QKV, DecoderAdapter
from .rounding import attend
from .subspace import Span
from .token_filter import Candidates

SCREEN_DIRECTIONS = 32
# How far a repeated first token is followed when nothing else tells how often it stands there.
LONGEST_REPEAT = 512


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
class _Front:
    """The prefixes of the current length with their cached keys and values in block 0."""

    indices: list[int]
    keys: Tensor  # prefixes x length x key heads x width
    values: Tensor
    starts: Tensor  # int64, prefixes


class PrefixSearch:
    """Grows the tree of prefixes of one update.

    Args:
        adapter: The architecture.
        spans: Spans of the taps (block, kind) that were shared; saturated ones are of no use here.
        candidates: Tokens that may stand at each position.
        expected_rows: The number of distinct prefixes, where a clear rank tells it, else None.
        memory: Bytes that intermediate results may take.
        seed: Seed of the screening directions.
        progress: Called with the number of prefixes confirmed so far and None.
    """

    def __init__(
        self,
        adapter: DecoderAdapter,
        spans: Mapping[tuple[int, str], Span],
        candidates: Candidates,
        *,
        expected_rows: int | None,
        memory: int,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.adapter, self.candidates, self.memory = adapter, candidates, memory
        self.expected_rows, self.progress = expected_rows, progress
        self.attention = spans.get((0, ATTENTION_OUTPUT))
        self.mlp = spans.get((0, MLP))
        self.next_block = spans.get((1, QKV)) if adapter.num_blocks > 1 else None
        self.rotary = candidates.every_position
        self.tree = Tree()
        if self.attention is not None:
            generator = torch.Generator().manual_seed(seed)
            directions = self.attention.screen(SCREEN_DIRECTIONS, generator)
            self.directions = directions.unflatten(0, (adapter.num_heads, adapter.head_width))

    @torch.no_grad()
    def run(self) -> Tree:
        """Grow until no prefix can be extended, or the rest is only repeats and every row is explained."""
        front = self._empty_front()
        for position in range(self.adapter.max_positions):
            front = self._step(front, position)
            if self.progress:
                self.progress(len(self.tree.nodes), None)
            if not front.indices and not self._later_starts(position):
                break
            if self._only_repeats(front, position):
                break
        return self.tree

    def _later_starts(self, position: int) -> bool:
        return not self.rotary and position + 1 < len(self.candidates.tokens)

    def _only_repeats(self, front: _Front, position: int) -> bool:
        """True where just chains of a repeated first token go on and there is no reason to follow them."""
        if not front.indices or not all(self.tree.nodes[index].repeats for index in front.indices):
            return False
        explained = self.expected_rows is not None and self.tree.distinct_rows() >= self.expected_rows
        return explained or position >= LONGEST_REPEAT

    def _empty_front(self) -> _Front:
        adapter = self.adapter
        device = adapter.first_input.tokens.device
        cache = torch.empty(0, 0, adapter.num_key_heads, adapter.head_width, device=device)
        return _Front([], cache, cache, torch.empty(0, dtype=torch.long, device=device))

    def _step(self, front: _Front, position: int) -> _Front:
        """Extend every prefix by every candidate of a position, and begin new ones where texts may begin."""
        adapter = self.adapter
        tokens = self.candidates.at(position)
        if not len(tokens):
            return self._empty_front()
        hidden = adapter.embed(tokens, position)
        query, key, value = adapter.project(0, adapter.attention_input(0, hidden), position)
        rows: list[tuple[int | None, Tensor, Tensor]] = []
        if position == 0 or not self.rotary:
            everyone = torch.arange(len(tokens), device=tokens.device)
            rows.append(self._confirm(None, front, everyone, hidden, query, key, value))
        for place in range(len(front.indices)):
            chosen = self._screened(front, place, query, key, value)
            if len(chosen):
                rows.append(self._confirm(place, front, chosen, hidden, query, key, value))
        return self._grown(front, position, tokens, key, value, rows)

    def _screened(self, front: _Front, place: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Candidates (int64 indices) whose attention output may lie in the span after one prefix."""
        everyone = torch.arange(len(query), device=query.device)
        if self.attention is None:
            return everyone
        adapter, span = self.adapter, self.attention
        start = int(front.starts[place])
        keys, values = front.keys[place, start:], front.values[place, start:]
        window = adapter.window(0)
        if window is not None:
            keys, values = keys[max(0, len(keys) - window + 1) :], values[max(0, len(values) - window + 1) :]
        groups = adapter.num_heads // adapter.num_key_heads
        split = self.directions.unflatten(0, (adapter.num_key_heads, groups))
        seen = torch.einsum("lkw,kgwn->kgln", values, split)
        own = torch.einsum("ckw,kgwn->kgcn", value, split)
        grouped = query.unflatten(1, (adapter.num_key_heads, groups))
        scores = torch.einsum("ckgw,lkw->kgcl", grouped, keys)
        own_score = torch.einsum("ckgw,ckw->kgc", grouped, key)
        weights = (torch.cat([scores, own_score[..., None]], -1) * adapter.scaling(0)).softmax(-1)
        mixed = torch.einsum("kgcl,kgln->cn", weights[..., :-1], seen)
        mixed += torch.einsum("kgc,kgcn->cn", weights[..., -1], own)
        largest = max(values.square().sum((1, 2)).max().item(), value.square().sum((1, 2)).max().item()) * groups
        return everyone[mixed.square().sum(1) <= 4 * span.worst**2 * largest]

    def _confirm(
        self, place: int | None, front: _Front, chosen: Tensor, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[int | None, Tensor, Tensor]:
        """Run the cascade exactly for one prefix (None: no prefix) and some candidates; returns (place, kept, ratios)."""
        adapter = self.adapter
        length = 1 if place is None else front.keys.shape[1] + 1
        entry = 4 * (2 * length * adapter.num_key_heads * adapter.head_width + 12 * adapter.hidden_size)
        kept, ratios = [chosen[:0]], [torch.empty(0, device=chosen.device)]
        for part in chosen.split(max(1, self.memory // entry)):
            keys, values = key[part, None], value[part, None]
            if place is not None:
                start = int(front.starts[place])
                keys = torch.cat([front.keys[place, start:].expand(len(part), -1, -1, -1), keys], 1)
                values = torch.cat([front.values[place, start:].expand(len(part), -1, -1, -1), values], 1)
            attended = attend(adapter, 0, query[part], keys, values)
            passed, ratio = self._cascade(hidden[part], attended)
            kept.append(part[passed])
            ratios.append(ratio)
        return place, torch.cat(kept), torch.cat(ratios)

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

    def _grown(
        self,
        front: _Front,
        position: int,
        tokens: Tensor,
        key: Tensor,
        value: Tensor,
        rows: list[tuple[int | None, Tensor, Tensor]],
    ) -> _Front:
        """Enter accepted prefixes into the tree and build the next front."""
        indices, starts, keys, values = [], [], [], []
        for place, kept, ratios in rows:
            for choice, ratio in zip(kept.tolist(), ratios.tolist(), strict=True):
                indices.append(self._enter(front, place, position, int(tokens[choice]), ratio))
                if place is None:
                    starts.append(position)
                    past_keys, past_values = (x.new_zeros(position, *x.shape[1:]) for x in (key, value))
                else:
                    starts.append(int(front.starts[place]))
                    past_keys, past_values = front.keys[place], front.values[place]
                keys.append(torch.cat([past_keys, key[choice, None]]))
                values.append(torch.cat([past_values, value[choice, None]]))
        if not indices:
            return self._empty_front()
        return _Front(indices, torch.stack(keys), torch.stack(values), torch.tensor(starts, device=tokens.device))

    def _enter(self, front: _Front, place: int | None, position: int, token: int, ratio: float) -> int:
        parent = None if place is None else front.indices[place]
        if parent is None:
            node = Node((token,), position, ratio, None, repeats=False)
        else:
            before = self.tree.nodes[parent]
            chain = self.rotary and before.tokens[0] == token and (before.repeats or len(before.tokens) == 1)
            node = Node((*before.tokens, token), before.start, max(ratio, before.ratio), parent, repeats=chain)
        self.tree.nodes.append(node)
        return len(self.tree.nodes) - 1
