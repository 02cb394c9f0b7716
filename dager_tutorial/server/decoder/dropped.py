"""Prefixes of a client that drops attention weights: its masks are unknown, and linear.

Chapter `14_defences`.

Dropout multiplies each head's attention weights with a mask, so that what enters the attention's output map is not
known of a prefix. But it stays a combination of the prefix's values, head by head: the vectors of that shape which lie
in the span of block 0's attention output are as many as the prefix has rows, and a token that goes on with it adds one.
That one tells the mask, too: divided by the attention weights its coefficients are equal, but for those that were
dropped. So a combination with the least absolute deviations from ones must pass through nearly all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.absolute import absolute_residual
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, FirstBlock, Front
from dager_tutorial.server.decoder.selector import Chosen
from dager_tutorial.server.subspace import Span

Values = Float[Tensor, "keys heads width"]


@dataclass
class DroppedSelector:
    """Chooses the extensions whose attention lies in the span under some mask.

    Attributes:
        span: The span of block 0's attention output.
        block: Block 0.
        longest_repeat: How far a rotary model's repeated first token is followed.
        widest: How many prefixes of one length are kept.
        certain: More than that cannot be true.
    """

    span: Span
    block: FirstBlock
    longest_repeat: int
    certain: bool = True
    widest: int = field(init=False)

    def __post_init__(self) -> None:
        """Different rows of one length are independent."""
        self.widest = self.span.rank

    def select(self, front: Front, extension: Extension) -> Chosen:
        """Choose extensions."""
        found: list[tuple[int, int, float]] = []
        places = range(len(front.nodes)) if front.nodes else [-1]
        if front.nodes or len(self.block.beginnings(extension)):
            fresh = self._by_head(extension.value)
            alone = torch.stack([_outside(self.span, one[None], one[None])[0, :, 0] for one in fresh])
            for place in places:
                if self.block.budget.late or not self._room(extension.position + 1):
                    break
                found += [
                    (place, choice, ratio) for choice, ratio in self._of_prefix(front, extension, place, fresh, alone)
                ]
        like = extension.tokens
        pairs = torch.tensor([each[:2] for each in found], dtype=torch.long, device=like.device).view(-1, 2)
        return Chosen(pairs, torch.tensor([each[2] for each in found], device=like.device))

    def _room(self, length: int) -> bool:
        """Whether any vector of a prefix's shape lies in the span that is none of its rows."""
        return length * self.block.adapter.num_heads + self.span.rank < self.span.width

    def _of_prefix(
        self, front: Front, extension: Extension, place: int, fresh: Values, alone: Tensor
    ) -> list[tuple[int, float]]:
        """The candidates that go on with a prefix, with their ratios."""
        known = self._by_head(front.values[place] if place >= 0 else extension.value[:0])
        before = _Rows.of(self.span, known)
        growing, repeats = before.growing(fresh, alone)
        chosen = growing | (repeats & (before.spare > 0))
        found = []
        for choice in chosen.nonzero()[:, 0].tolist():
            if place < 0:  # a first token sees itself alone: there are no weights to compare
                found.append((choice, 1.0))
                continue
            kept = self._kept(front, extension, place, choice, torch.cat([known, fresh[choice : choice + 1]]))
            if kept >= constants().kept_weights:
                found.append((choice, 1 / kept))
        return found

    def _by_head(self, values: Tensor) -> Values:
        """Values (float64) of all heads that read them."""
        groups = self.block.adapter.num_heads // self.block.adapter.num_key_heads
        return precise(values.repeat_interleave(groups, 1))

    def _kept(self, front: Front, extension: Extension, place: int, choice: int, values: Values) -> float:
        """The share of attention weights that one mask leaves as they are, of those that are large enough to tell."""
        one = Extension(
            extension.position,
            *(
                getattr(extension, name)[choice : choice + 1]
                for name in ("tokens", "hidden", "query", "key", "value", "seen")
            ),
        )
        at = torch.tensor([place], device=front.keys.device)
        weights = precise(self.block.shares(front, one, at)[0, 0]).T  # keys x heads
        null = _Rows.of(self.span, values).null.flatten(0, 1)
        large = weights.flatten() >= constants().telling_weight
        if int(large.sum()) <= null.shape[1]:
            return 0.0
        scaled = torch.linalg.qr(null[large] / weights.flatten()[large, None]).Q
        return _fitted_ones(scaled)


def _fitted_ones(basis: Float[Tensor, "coordinates directions"]) -> float:
    """The share of coordinates at which the combination with the least absolute deviations from one is one."""
    left = absolute_residual(basis.new_ones(len(basis)), basis)
    return float((left.abs() < constants().same_weight).float().mean())


@dataclass(frozen=True)
class _Rows:
    """The vectors of a prefix's shape, of which some lie in the span.

    Attributes:
        span: The span.
        values: The prefix's values.
        directions: float64, eigenvectors of what its values leave outside the span.
        outside: float64, the eigenvalues, rising, relative to the values' size.
        size: That size: what a coordinate leaves outside alone, on average.
    """

    span: Span
    values: Values
    directions: Float[Tensor, "coordinates coordinates"]
    outside: Float[Tensor, " coordinates"]
    size: float

    @classmethod
    def of(cls, span: Span, values: Values) -> _Rows:
        """Take the values of some keys apart."""
        count, heads = values.shape[:2]
        gram = _outside(span, values, values).reshape(count * heads, count * heads)
        if not count:
            return cls(span, values, gram, gram.diagonal(), 1.0)
        outside, directions = torch.linalg.eigh(gram)
        size = float(gram.diagonal().mean())
        return cls(span, values, directions, outside / size, size)

    @property
    def null(self) -> Float[Tensor, "keys heads rows"]:
        """The coefficients of vectors that lie in the span."""
        chosen = self.directions[:, self.outside <= constants().dropped_outside]
        return chosen.unflatten(0, self.values.shape[:2])

    @property
    def spare(self) -> int:
        """How many vectors lie in the span besides one for each key."""
        return int((self.outside <= constants().dropped_outside).sum()) - len(self.values)

    def growing(self, fresh: Values, alone: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some values add a vector in the span, and which add nothing, as the prefix has them already.

        Args:
            fresh: The values.
            alone: Products of what each of them has outside the span in all heads (fresh x heads x heads).
        """
        shared = _outside(self.span, self.values, fresh).flatten(0, 1)  # coordinates x fresh x heads
        rest = self.outside > constants().dropped_outside
        scales = (self.outside[rest] * self.size).sqrt()[:, None, None]
        seen = torch.einsum("cr,cfh->rfh", self.directions[:, rest], shared) / scales if len(self.values) else shared
        left = alone - torch.einsum("rfh,rfg->fhg", seen, seen)
        least = torch.linalg.eigvalsh(left)[:, 0]
        whole = alone.diagonal(dim1=1, dim2=2).mean(1)
        repeats = left.diagonal(dim1=1, dim2=2).mean(1) <= constants().dropped_outside * whole
        return (least <= constants().dropped_outside * whole) & ~repeats, repeats


def _outside(span: Span, some: Values, others: Float[Tensor, "others heads width"]) -> Tensor:
    """Products of what values, each in its head's place, have outside a span (some x heads x others x heads)."""
    heads = some.shape[1]
    signal = span.signal.unflatten(0, (heads, -1))
    inside = [torch.einsum("khw,hwn->khn", each, signal) for each in (some, others)]
    products = -torch.einsum("khn,lgn->khlg", *inside)
    same = torch.einsum("khw,lhw->khl", some, others)
    products.diagonal(dim1=1, dim2=3).add_(same.transpose(1, 2))
    return products
