"""The rows of a batch with their dropout masks, which the embeddings' gradients print.

Chapter `14_defences`.

Dropout multiplies the sum of a token's and a position's embedding with a mask, and the gradient of that sum with the
same mask: it is exactly zero where the mask is. A row of the embeddings' gradient that holds one row of the batch shows
its mask; one that holds two is zero where both masks are. So rows are read where one is left, taken off their token's
and their position's gradient, and what is left there may be one row again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants
from dager_tutorial.server.dropout.absolute import embeddings_span, likely_pairs, mask_of
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Row:
    """One row of the batch.

    Attributes:
        token: Its token id.
        position: Where it stands.
        ratio: The residual ratio of its vector at block 0.
        vector: float32, what entered block 0's attention.
    """

    token: int
    position: int
    ratio: float
    vector: Float[Tensor, " width"]


@dataclass
class _Sums:
    """Gradients of embeddings, from which rows are taken off: one table for tokens, one for positions.

    Attributes:
        ids: int64, token ids, or positions.
        rest: float64, what is left.
        sizes: float64, root mean squares before anything was taken off.
    """

    ids: Int[Tensor, " rows"]
    rest: Float[Tensor, "rows width"]
    sizes: Float[Tensor, " rows"] = field(init=False)

    def __post_init__(self) -> None:
        """Measure what was there."""
        self.sizes = self.rest.square().mean(1).sqrt()

    @property
    def silent(self) -> Bool[Tensor, "rows width"]:
        """Where nothing but rounding is left."""
        return self.rest.abs() <= constants().masked_rounding * self.sizes[:, None]

    @property
    def shares(self) -> Float[Tensor, " rows"]:
        """The share of entries where nothing is left."""
        return self.silent.float().mean(1)


def dropout_rate(evidence: Evidence) -> float | None:
    """The rate of a causal model's dropout behind its embeddings, from zeros inside their gradient; None without it.

    In a difference of weights zeros are entries that a step was too small to move: they tell nothing.

    Args:
        evidence: The update's gradients.
    """
    sums = None if evidence.pruned or evidence.bits or evidence.drifts else _tables(evidence)
    if sums is None:
        return None
    loud = sums[0].sizes > constants().quiet_row * sums[0].sizes.max()  # a moment's difference leaves rounding
    shares = sums[0].shares[loud]
    largest = float(shares.max())
    if largest < constants().fewest_absent:
        return None
    return round(float(shares[shares > largest / 2].mean()), 2)


def _tables(evidence: Evidence) -> tuple[_Sums, _Sums] | None:
    """The gradients of the token and position embeddings; None where a causal model has no such, or did not share."""
    table = evidence.adapter.position_table
    if table is None or not isinstance(evidence.adapter, DecoderAdapter) or evidence.is_remainder:
        return None
    names = {id(each): name for name, each in evidence.adapter.network.named_parameters()}
    source = evidence.adapter.first_input
    found = [evidence.gradients.get(names[id(each)]) for each in (source.tokens, table[0])]
    sums = []
    for gradient in found:
        if gradient is None or gradient.dtype not in (torch.float32, torch.float64):
            return None
        ids = gradient.any(1).nonzero()[:, 0]
        if not len(ids) or 2 * len(ids) > len(gradient):
            return None
        sums.append(_Sums(ids, precise(gradient[ids])))
    return sums[0], sums[1]


def masked_rows(evidence: Evidence, span: Span, rate: float) -> list[Row]:
    """Read rows one by one, as long as a row of the embeddings' gradients holds just one.

    Args:
        evidence: The update's gradients.
        span: The span of block 0's query, key and value gradient.
        rate: The share of entries that dropout sets to zero.

    Returns:
        The rows whose vectors lie in the span.
    """
    tables = _tables(evidence)
    assert tables is not None, "the embeddings' gradients were not shared"
    reader = _Reader(evidence.adapter.first_input, span, rate, *tables)
    rows: list[Row] = []
    while fresh := list(reader.round()):
        rows += fresh
    return rows + list(reader.others(span.rank - len(rows)))


@dataclass
class _Reader:
    """Takes rows off the gradients of tokens and positions."""

    source: FirstInput
    span: Span
    rate: float
    tokens: _Sums
    positions: _Sums

    def round(self) -> Iterator[Row]:
        """Every row that stands alone in the gradient of its token or its position."""
        for one, other, by_token in ((self.tokens, self.positions, True), (self.positions, self.tokens, False)):
            for place, silent in enumerate(one.silent):
                share = float(silent.float().mean())
                if not self.rate**1.5 < share < 1 - (1 - self.rate) / 4:  # two rows are silent together at rate^2
                    continue
                left = (other.shares < 1).nonzero()[:, 0]
                found = self._likeliest(one.ids[place], other.ids[left], silent, by_token=by_token)
                if found is None:
                    continue
                at, row = found
                gradient = torch.where(silent, 0.0, one.rest[place])
                one.rest[place] = 0.0
                other.rest[left[at]] -= gradient
                yield row

    def others(self, missing: int) -> Iterator[Row]:
        """Rows whose masks no gradient shows alone, as many as are missing at most."""
        if missing <= 0:
            return
        basis = embeddings_span(self.source, self.span)
        tokens, positions = (sums.ids[sums.shares < 1] for sums in (self.tokens, self.positions))
        for token, position in likely_pairs(self.source, basis, tokens, positions, self.rate):
            for row in self._copies(token, position, basis):
                yield row
                missing -= 1
                if not missing:
                    return

    def _copies(self, token: int, position: int, basis: Tensor) -> Iterator[Row]:
        """The rows of one token at one position, each with its mask."""
        assert self.source.positions is not None
        embedding = self.source.tokens[token] + self.source.positions[position]
        explained = torch.zeros(embedding.shape, dtype=torch.bool, device=embedding.device)
        for _ in range(constants().most_copies):
            silent = mask_of(precise(embedding), basis, explained.to(basis.device)).to(embedding.device)
            vector = self.source.normed(torch.where(silent, 0.0, embedding / (1 - self.rate))[None])
            # Another mask is zero at its rate where those before are not; the same one again, nowhere or nearly so.
            if 2 * int((silent & ~explained).sum()) < self.rate * int((~explained).sum()):
                return
            if not bool(self.span.holds(vector)):
                return
            explained |= silent
            yield Row(token, position, float(self.span.ratio(vector)), vector[0])

    def _likeliest(self, own: Tensor, others: Tensor, silent: Tensor, *, by_token: bool) -> tuple[int, Row] | None:
        """Of the rows with one id and each of others, all with the same mask, that which lies in the span."""
        tokens, positions = (own.expand_as(others), others) if by_token else (others, own.expand_as(others))
        assert self.source.positions is not None
        embedding = self.source.tokens[tokens] + self.source.positions[positions]
        vectors = self.source.normed(torch.where(silent.to(embedding.device), 0.0, embedding / (1 - self.rate)))
        ratios = self.span.ratio(vectors)
        at = int(ratios.argmin())
        if not bool(self.span.holds(vectors[at : at + 1])):
            return None
        return at, Row(int(tokens[at]), int(positions[at]), float(ratios[at]), vectors[at])
