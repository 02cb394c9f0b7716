"""Block 0 replayed for all prefixes of one length and all candidates of the next position.

Chapter `06_decoder_recovery`.

Keys and values of accepted prefixes are kept, and queries, keys and values of a position's candidates are shared by all
prefixes, so that nothing is computed twice: what is left for each pair is one row of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.attention import attend, mix_beside, scores, unseen, weights
from dager_tutorial.server.budget import Budget


@dataclass
class Front:
    """Prefixes of one length, with what is cached of their tokens in block 0.

    Attributes:
        nodes: Their indices in the tree.
        starts: int64, position of each first token.
        keys: float32.
        values: float32.
        seen: float32, the values' contributions to the screening directions.
    """

    nodes: list[int]
    starts: Int[Tensor, " prefixes"]
    keys: Float[Tensor, "prefixes length key_heads width"]
    values: Float[Tensor, "prefixes length key_heads width"]
    seen: Float[Tensor, "prefixes length heads directions"]

    def take(self, places: list[int]) -> Front:
        """The front of some of its prefixes."""
        rows = torch.tensor(places, dtype=torch.long, device=self.keys.device)
        nodes = [self.nodes[place] for place in places]
        return Front(nodes, self.starts[rows], self.keys[rows], self.values[rows], self.seen[rows])


@dataclass(frozen=True)
class Extension:
    """Candidates of one position, as block 0 sees them.

    Attributes:
        position: The position.
        tokens: int64 token ids.
        hidden: float32, before block 0.
        query: float32.
        key: float32.
        value: float32.
        seen: float32, the value's contribution to the screening directions.
    """

    position: int
    tokens: Int[Tensor, " candidates"]
    hidden: Float[Tensor, "candidates hidden"]
    query: Float[Tensor, "candidates heads width"]
    key: Float[Tensor, "candidates key_heads width"]
    value: Float[Tensor, "candidates key_heads width"]
    seen: Float[Tensor, "candidates heads directions"]


@dataclass(frozen=True)
class FirstBlock:
    """Block 0 of a causal model, for pairs of a prefix and a candidate.

    Attributes:
        adapter: The architecture.
        directions: float32, heads x width x directions: where values are screened; no directions for no screen.
        budget: What intermediate results may cost.
    """

    adapter: DecoderAdapter
    directions: Float[Tensor, "heads width directions"]
    budget: Budget

    @classmethod
    def screened(cls, adapter: DecoderAdapter, directions: Tensor | None, budget: Budget) -> FirstBlock:
        """Block 0 with a screen.

        Args:
            adapter: The architecture.
            directions: float32, (heads * width) x directions; None for no screen.
            budget: What intermediate results may cost.
        """
        if directions is None:
            directions = adapter.first_input.tokens.new_zeros(adapter.num_heads * adapter.head_width, 0)
        return cls(adapter, directions.unflatten(0, (adapter.num_heads, adapter.head_width)), budget)

    @property
    def rotary(self) -> bool:
        """Whether positions enter in the attention only."""
        return self.adapter.first_input.positions is None

    def empty(self) -> Front:
        """The front before any token."""
        like, heads = self.adapter.first_input.tokens, self.adapter.num_heads
        cache = like.new_empty(0, 0, self.adapter.num_key_heads, self.adapter.head_width)
        seen = like.new_empty(0, 0, heads, self.directions.shape[2])
        return Front([], torch.empty(0, dtype=torch.long, device=like.device), cache, cache, seen)

    def extension(self, position: int, tokens: Int[Tensor, " candidates"]) -> Extension:
        """What block 0 makes of candidates at a position."""
        return self.placed(self.unplaced(tokens, position), position)

    def unplaced(self, tokens: Int[Tensor, " candidates"], position: int = 0) -> Extension:
        """The same before any rotation: for rotary models it is the same at every position."""
        adapter = self.adapter
        hidden = adapter.embed(tokens, position)
        query, key, value = adapter.query_key_value(0, adapter.attention_input(0, hidden))
        groups = adapter.num_heads // adapter.num_key_heads
        seen = torch.einsum("chw,hwn->chn", value.repeat_interleave(groups, 1), self.directions)
        return Extension(position, tokens, hidden, query, key, value, seen)

    def placed(self, extension: Extension, position: int) -> Extension:
        """Candidates before any rotation at a position."""
        query, key, _ = self.adapter.placed(0, (extension.query, extension.key, extension.value), position)
        return replace(extension, position=position, query=query, key=key)

    def beginnings(self, extension: Extension) -> Int[Tensor, "pairs 2"]:
        """Pairs of no prefix (-1) and every candidate, where texts may begin at this position."""
        count = len(extension.tokens) if extension.position == 0 or not self.rotary else 0
        alone = torch.arange(count, device=extension.tokens.device)
        return torch.stack([torch.full_like(alone, -1), alone], 1)

    def chunks(self, front: Front, extension: Extension) -> Iterator[Int[Tensor, " places"]]:
        """Prefixes whose attention with every candidate fits into memory at once; none once the time is spent."""
        adapter = self.adapter
        length = extension.position + 1
        entry = 4 * len(extension.tokens) * (3 * adapter.num_heads * length + 8 * adapter.hidden_size)
        for places in torch.arange(len(front.nodes), device=front.keys.device).split(self.budget.chunk(entry)):
            if self.budget.late:
                return
            yield places

    def screen(
        self, front: Front, extension: Extension, places: Int[Tensor, " places"]
    ) -> Float[Tensor, "places candidates"]:
        """Squared screened residuals (float32) of the attention output of every candidate after some prefixes."""
        shares = self.shares(front, extension, places)
        mixed = shares[..., :-1].flatten(2) @ front.seen[places].transpose(1, 2).flatten(1, 2)
        mixed += torch.einsum("ach,chn->acn", shares[..., -1], extension.seen)
        return mixed.square().sum(2)

    def of_all(
        self, front: Front, extension: Extension, places: Int[Tensor, " places"]
    ) -> Float[Tensor, "places candidates inputs"]:
        """Inputs of block 0's attention output map (float32) for every candidate after some prefixes."""
        shares = self.shares(front, extension, places)
        return mix_beside(shares, front.values[places, None], extension.value)

    def of_pairs(
        self, front: Front, extension: Extension, pairs: Int[Tensor, "pairs 2"]
    ) -> Iterator[tuple[Int[Tensor, " part"], Float[Tensor, "part inputs"]]]:
        """Chunks of pairs: their indices and the inputs of block 0's attention output map (float32)."""
        rest = torch.arange(len(pairs), device=pairs.device)
        if len(pairs) and int(pairs[0, 0]) >= 0:
            # Where a prefix has many candidates left, its cache is not copied for each of them.
            crowded = 4 * pairs[:, 0].bincount(minlength=len(front.nodes)) >= len(extension.tokens)
            for place in crowded.nonzero()[:, 0]:
                if self.budget.late:
                    return
                part = (pairs[:, 0] == place).nonzero()[:, 0]
                yield part, self.of_all(front, extension, place[None])[0, pairs[part, 1]]
            rest = (~crowded[pairs[:, 0]]).nonzero()[:, 0]
        yield from self._copied(front, extension, pairs, rest)

    def _copied(
        self, front: Front, extension: Extension, pairs: Tensor, rest: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for some of the pairs, each with a copy of its prefix's keys and values."""
        adapter = self.adapter
        length = front.keys.shape[1] + 1
        entry = 4 * (4 * length * adapter.num_heads * adapter.head_width + 12 * adapter.hidden_size)
        for part in rest.split(self.budget.chunk(entry)):
            if self.budget.late or not len(part):
                return
            place, choice = pairs[part].unbind(1)
            keys, values = extension.key[choice, None], extension.value[choice, None]
            hidden: Bool[Tensor, "part length"] | None = None
            if int(place[0]) >= 0:
                keys = torch.cat([front.keys[place], keys], 1)
                values = torch.cat([front.values[place], values], 1)
                hidden = unseen(length, front.starts[place], adapter.window(0))
            yield part, attend(extension.query[choice], keys, values, adapter.scaling(0), hidden)

    def shares(self, front: Front, extension: Extension, places: Tensor) -> Tensor:
        """Attention weights (places x candidates x heads x length + 1) of every pair, its own key last."""
        adapter = self.adapter
        before = scores(extension.query, front.keys[places, None], adapter.scaling(0))
        own = scores(extension.query, extension.key[:, None], adapter.scaling(0))
        together = torch.cat([before, own.expand(len(places), -1, -1, -1)], -1)
        hidden = unseen(extension.position + 1, front.starts[places], adapter.window(0))
        return weights(together, hidden[:, None])

    def grown(self, front: Front, extension: Extension, pairs: Int[Tensor, "pairs 2"], nodes: list[int]) -> Front:
        """The front of accepted pairs, which are the given nodes of the tree."""
        place, choice = pairs.unbind(1)
        old = place >= 0
        starts = torch.full_like(place, extension.position)
        starts[old] = front.starts[place[old]]

        def longer(past: Tensor, new: Tensor) -> Tensor:
            cache = new.new_zeros(len(pairs), extension.position + 1, *new.shape[1:])
            if bool(old.any()):
                cache[old, :-1] = past[place[old]]
            cache[:, -1] = new[choice]
            return cache

        keys, values = longer(front.keys, extension.key), longer(front.values, extension.value)
        return Front(nodes, starts, keys, values, longer(front.seen, extension.seen))
