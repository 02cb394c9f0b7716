"""How a vector spreads over the spectrum of a tap's gradient, however full its span is (chapter `11_limits`).

The leverage of a vector over a gradient is `sum_j (x . v_j)^2 / s_j^2`: one number for the whole spectrum. How much of
the vector lies in the weakest few directions, in the next few, and so on, in bands that double in width, says more: a
row of the batch avoids the weak directions in its own way at every tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import Evidence


@dataclass(frozen=True)
class Bands:
    """A tap's spectrum, cut into bands.

    Attributes:
        directions: float32, right singular vectors as columns, the weakest first.
        edges: Where the bands begin and end.
    """

    directions: Float[Tensor, "inputs inputs"]
    edges: tuple[int, ...]

    def log_shares(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows bands"]:
        """Logarithms (float32) of the share of each vector's square that lies in each band."""
        squares = (vectors.float() @ self.directions).square()
        return log_shares(squares, self.edges, squares.sum(1))


def log_shares(
    squares: Float[Tensor, "rows directions"], edges: tuple[int, ...], size: Float[Tensor, " rows"]
) -> Float[Tensor, "rows bands"]:
    """Logarithms of the share of each band in a square.

    Args:
        squares: Squares of coefficients, the weakest direction first.
        edges: Where the bands begin and end.
        size: The whole squares.
    """
    sums = torch.stack([squares[:, begin:end].sum(1) for begin, end in pairwise(edges)], 1)
    return (sums / size.clamp(min=1e-30)[:, None]).clamp(min=1e-30).log()


def band_edges(width: int) -> tuple[int, ...]:
    """Where bands that double in width begin and end.

    >>> band_edges(768)
    (0, 8, 16, 32, 64, 128, 256, 512, 768)
    """
    first = range(constants().bands - 1)
    inner = [round(2 * width / 3 / 2**power) for power in first]
    return (0, *sorted({each for each in inner if each >= 2}), width)


def bands(gradient: Float[Tensor, "outputs inputs"]) -> Bands:
    """Read a tap's spectrum off its gradient, its outputs scaled to equal rounding.

    Args:
        gradient: float64.
    """
    sizes = gradient.norm(dim=1)
    scaled = gradient[sizes > 0] / sizes[sizes > 0, None]
    directions = torch.linalg.eigh(scaled.T @ scaled).eigenvectors
    return Bands(directions.float(), band_edges(gradient.shape[1]))


def summed_taps(evidence: Evidence, adapter: DecoderAdapter, ends: Sequence[Tap], budget: Budget) -> list[Tap]:
    """The taps whose evidence is summed: all that were shared, in the order of the forward pass, as memory allows.

    Block 0's query, key and value, which chose the candidates, say nothing more. Where the last block has rows of the
    texts' ends only, its later taps say nothing of other prefixes.

    Args:
        evidence: The update's gradients.
        adapter: The architecture.
        ends: Taps that tell where texts end, none where every token carries a loss.
        budget: What spectra may take.
    """
    blocks = range(adapter.num_blocks)
    every = [adapter.tap(block, kind) for block in blocks for kind in (QKV, ATTENTION_OUTPUT, MLP)]
    silent = {(0, QKV)} | ({(blocks[-1], kind) for kind in (ATTENTION_OUTPUT, MLP)} if ends else set())
    taps = [tap for tap in every if (tap.block, tap.kind) not in silent]
    shared = [tap for tap in taps if _speaks(evidence, tap)]
    return shared[: budget.chunk(4 * adapter.hidden_size**2)]


def _speaks(evidence: Evidence, tap: Tap) -> bool:
    gradient = tap.gradient(evidence.gradients)
    return gradient is not None and bool(gradient.any())


def spectra_of(evidence: Evidence, taps: Sequence[Tap]) -> dict[Tap, Bands]:
    """The spectra of some taps.

    Args:
        evidence: The update's gradients, of which every tap has some.
        taps: The taps.
    """
    gradients = {tap: tap.gradient(evidence.gradients) for tap in taps}
    return {tap: bands(gradient) for tap, gradient in gradients.items() if gradient is not None}
