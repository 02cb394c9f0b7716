"""Extensions of prefixes on their way through the blocks, with what is read of them there (chapter `11_limits`).

The front of `front` knows block 0 only. Here keys and values of all blocks are cached for every prefix that is kept, so
that an extension costs one token in each block, and those that look bad in early blocks never see the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.attention import attend, mix_beside, scores, weights
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension

Prefix = tuple[int, ...]
"""Token ids from the first on."""

Reader = Callable[[Tensor], Tensor]
"""What is kept of the vectors (float32) that enter a tap, row by row."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of prefixes of one length.

    Attributes:
        keys: For each block prefixes x length x key heads x width, float32.
        values: Likewise.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Rows:
    """Extensions behind some half blocks.

    Attributes:
        places: int64, the prefix that each extends.
        tokens: int64, the token that it adds.
        position: Where the token stands.
        hidden: float32, before the next half block.
        halves: How many half blocks lie behind.
        keys: For each block so far, the token's key.
        values: Likewise its value.
        evidence: float32, what was kept at the taps so far: log-shares, or the vectors.
        attended: float32, what enters the last block's attention output map; None before.
    """

    places: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]
    position: int
    hidden: Float[Tensor, "rows width"]
    halves: int = 0
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    evidence: tuple[Tensor, ...] = ()
    attended: Tensor | None = None

    def features(self) -> Float[Tensor, "rows features"]:
        """What was kept, side by side."""
        return torch.cat([self.hidden.new_empty(len(self.hidden), 0), *self.evidence], 1)

    def named(self, prefixes: Sequence[Prefix]) -> list[Prefix]:
        """The tokens of the extended prefixes.

        Args:
            prefixes: Those that are extended.
        """
        pairs = zip(self.places.tolist(), self.tokens.tolist(), strict=True)
        return [(*prefixes[place], token) for place, token in pairs]

    def take(self, chosen: Tensor) -> Rows:
        """Some of the extensions."""

        def of_each(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(part[chosen] for part in parts)

        return replace(
            self,
            places=self.places[chosen],
            tokens=self.tokens[chosen],
            hidden=self.hidden[chosen],
            keys=of_each(self.keys),
            values=of_each(self.values),
            evidence=of_each(self.evidence),
            attended=None if self.attended is None else self.attended[chosen],
        )

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """Parts one behind the other, all behind the same half blocks."""

        def of_each(sides: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(side) for side in zip(*sides, strict=True))

        attended = [part.attended for part in parts if part.attended is not None]
        return replace(
            parts[0],
            places=torch.cat([part.places for part in parts]),
            tokens=torch.cat([part.tokens for part in parts]),
            hidden=torch.cat([part.hidden for part in parts]),
            keys=of_each([part.keys for part in parts]),
            values=of_each([part.values for part in parts]),
            evidence=of_each([part.evidence for part in parts]),
            attended=torch.cat(attended) if attended else None,
        )


@dataclass(frozen=True)
class Passage:
    """The blocks of a causal model, with the taps that are read on the way.

    Attributes:
        adapter: The architecture.
        readers: The taps that are read, and what is kept of the vectors there.
        budget: What intermediate results may cost.
        blocks: How many blocks extensions go through; None for all.
    """

    adapter: DecoderAdapter
    readers: Mapping[Tap, Reader]
    budget: Budget
    blocks: int | None = None
    _taps: dict[tuple[int, str], Tap] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Index the taps by their places."""
        self._taps.update({(tap.block, tap.kind): tap for tap in self.readers})

    def empty(self) -> Cache:
        """The cache of one prefix without tokens."""
        adapter = self.adapter
        shape = (1, 0, adapter.num_key_heads, adapter.head_width)
        nothing = tuple(adapter.first_input.tokens.new_empty(shape) for _ in range(self.depth))
        return Cache(nothing, nothing)

    def random(self, cache: Cache, pool: Int[Tensor, " pool"], position: int, generator: torch.Generator) -> Rows:
        """Extensions that are hardly ever true, behind all blocks: any token of a pool after any prefix.

        Args:
            cache: Keys and values of the prefixes.
            pool: int64 token ids.
            position: Where the tokens stand.
            generator: Source of randomness, on the CPU.
        """
        count, prefixes = constants().usual_sample, len(cache.keys[0])
        tokens = pool[torch.randint(len(pool), (count,), generator=generator).to(pool.device)]
        places = torch.randint(prefixes, (count,), generator=generator).to(pool.device)
        return self.through(self.enter(places, tokens, position), cache, self.halves)

    def enter(self, places: Int[Tensor, " rows"], tokens: Int[Tensor, " rows"], position: int) -> Rows:
        """Extensions before block 0."""
        return Rows(places, tokens, position, self.adapter.embed(tokens, position))

    def shares(self, extension: Extension, cache: Cache, place: int) -> Float[Tensor, "candidates heads keys"]:
        """Block 0's attention weights of all candidates behind one prefix, the own key last."""
        keys = cache.keys[0][place, self.seen(0, extension.position)]
        return _shares_beside(extension.query, keys, extension.key, self.adapter.scaling(0))

    def begin(
        self,
        extension: Extension,
        shares: Float[Tensor, "candidates heads keys"],
        cache: Cache,
        place: int,
        choice: Int[Tensor, " rows"],
    ) -> Rows:
        """Some candidates behind one prefix, behind block 0's attention.

        Args:
            extension: The candidates.
            shares: Their attention weights.
            cache: Keys and values of the prefixes.
            place: The prefix.
            choice: int64, which of the candidates.
        """
        past = cache.values[0][place, self.seen(0, extension.position)]
        attended = mix_beside(shares[choice], past, extension.value[choice])
        places = torch.full_like(choice, place)
        rows = Rows(places, extension.tokens[choice], extension.position, extension.hidden[choice])
        return self._attended(rows, 0, extension.key[choice], extension.value[choice], attended)

    @property
    def depth(self) -> int:
        """How many blocks extensions go through."""
        return self.adapter.num_blocks if self.blocks is None else min(self.blocks, self.adapter.num_blocks)

    @property
    def halves(self) -> int:
        """How many half blocks there are: each block's attention, then its MLP, which the last block needs no more."""
        return 2 * self.depth - (self.depth == self.adapter.num_blocks)

    def through(self, rows: Rows, cache: Cache, halves: int) -> Rows:
        """Extensions behind so many half blocks, in chunks that memory allows.

        Args:
            rows: Where they are.
            cache: Keys and values of the prefixes.
            halves: How many half blocks they have behind them then.
        """
        adapter = self.adapter
        entry = 4 * (2 * (rows.position + 1) * adapter.num_heads * adapter.head_width + 16 * adapter.hidden_size)
        parts = torch.arange(len(rows.hidden), device=rows.hidden.device).split(self.budget.chunk(8 * entry))
        return Rows.joined([self._through(rows.take(part), cache, halves) for part in parts])

    def _through(self, rows: Rows, cache: Cache, halves: int) -> Rows:
        for half in range(rows.halves, halves):
            rows = self._mlp(rows, half // 2) if half % 2 else self._attention(rows, cache, half // 2)
        return rows

    def _attention(self, rows: Rows, cache: Cache, block: int) -> Rows:
        """Extensions behind a block's attention."""
        adapter = self.adapter
        query, key, value = adapter.project(block, adapter.attention_input(block, rows.hidden), rows.position)
        attended = self._mixed(rows, block, cache, query, key, value)
        return self._attended(rows, block, key, value, attended)

    def _mixed(self, rows: Rows, block: int, cache: Cache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What attention gives. Where prefixes have many extensions each, none is copied for every one of them."""
        scaling, seen = self.adapter.scaling(block), self.seen(block, rows.position)
        keys, values = cache.keys[block][:, seen], cache.values[block][:, seen]
        places, counts = rows.places.unique_consecutive(return_counts=True)
        if 4 * len(places) >= len(rows.places):  # few each, or none at all
            keys = torch.cat([keys[rows.places], key[:, None]], 1)
            return attend(query, keys, torch.cat([values[rows.places], value[:, None]], 1), scaling)
        parts = zip(places, *(part.split(counts.tolist()) for part in (query, key, value)), strict=True)
        return torch.cat(
            [
                mix_beside(_shares_beside(some, keys[place], own, scaling), values[place], known)
                for place, some, own, known in parts
            ]
        )

    def _attended(self, rows: Rows, block: int, key: Tensor, value: Tensor, attended: Tensor) -> Rows:
        adapter = self.adapter
        hidden = adapter.after_attention(block, rows.hidden, attended)
        evidence = [*rows.evidence, *self._read(block, ATTENTION_OUTPUT, attended)]
        if (block, MLP) in self._taps:
            evidence += self._read(block, MLP, adapter.mlp_input(block, hidden))
        return replace(
            rows,
            hidden=hidden,
            halves=rows.halves + 1,
            keys=(*rows.keys, key),
            values=(*rows.values, value),
            evidence=tuple(evidence),
            attended=attended if block == adapter.num_blocks - 1 else None,
        )

    def _mlp(self, rows: Rows, block: int) -> Rows:
        """Extensions behind a block's MLP."""
        adapter = self.adapter
        activated, hidden = adapter.through_mlp(block, rows.hidden, adapter.mlp_input(block, rows.hidden))
        evidence = [*rows.evidence, *self._read(block, MLP_OUTPUT, activated)]
        if (block + 1, QKV) in self._taps:
            evidence += self._read(block + 1, QKV, adapter.attention_input(block + 1, hidden))
        return replace(rows, hidden=hidden, halves=rows.halves + 1, evidence=tuple(evidence))

    def seen(self, block: int, position: int) -> slice:
        """Which cached keys a token sees beside its own."""
        window = self.adapter.window(block)
        return slice(0, None) if window is None else slice(max(0, position + 1 - window), None)

    def _read(self, block: int, kind: str, vectors: Tensor) -> list[Tensor]:
        """What is kept at a tap; nothing where it is not among those that are read."""
        tap = self._taps.get((block, kind))
        return [] if tap is None else [self.readers[tap](vectors)]

    def grown(self, cache: Cache, rows: Rows) -> Cache:
        """The cache of extensions that are behind all half blocks."""

        def longer(past: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.cat([old[rows.places], each[:, None]], 1) for old, each in zip(past, new, strict=True))

        return Cache(longer(cache.keys, rows.keys), longer(cache.values, rows.values))


def _shares_beside(query: Tensor, keys: Tensor, own: Tensor, scaling: float) -> Float[Tensor, "rows heads keys"]:
    """Attention weights of queries behind one prefix, each of which sees a key of its own, too: that one last."""
    return weights(torch.cat([scores(query, keys, scaling), scores(query, own[:, None], scaling)], -1))
