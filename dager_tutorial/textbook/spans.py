"""The span of a block's inputs, read off its gradient, and how far a vector lies from it (chapter `03_span`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.errors import DagerError
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV, Tap, precise
from dager_tutorial.status import Status
from dager_tutorial.update import Update

RELATIVE_TOLERANCE = 5e-7
"""Share of the largest singular value up to which one counts as zero: a few float32 roundings."""


def textbook_span(
    gradient: Float[Tensor, "outputs inputs"], rank_tolerance: float | None = None, rank_cutoff: int = 0
) -> Float[Tensor, "inputs rank"]:
    """An orthonormal basis of the row space of a gradient: the span of its layer's inputs (Theorem 5.1).

    Args:
        gradient: Each row is a combination of the layer's input vectors.
        rank_tolerance: Singular values up to this one count as zero. None: 5e-7 of the largest. The paper's
            code wants an absolute tolerance, set by hand for each batch size between 1e-7 and 1e-9.
        rank_cutoff: The rank is kept so far below the width, so that a full one leaves something to test; the paper's
            Delta_b, 20 there.

    Returns:
        float32; no columns where the gradient is zero.

    Example:
        >>> textbook_span(torch.tensor([[3.0, 0.0, 4.0], [6.0, 0.0, 8.0]])).abs().round(decimals=3)
        tensor([[0.6000],
                [0.0000],
                [0.8000]])
    """
    _, singular_values, directions = torch.linalg.svd(precise(gradient), full_matrices=False)
    if rank_tolerance is None:
        rank_tolerance = RELATIVE_TOLERANCE * float(singular_values[0])
    rank = int((singular_values > rank_tolerance).sum())
    return directions[: min(rank, gradient.shape[1] - rank_cutoff)].T.float()


def span_distance(vectors: Float[Tensor, "rows inputs"], basis: Float[Tensor, "inputs rank"]) -> Float[Tensor, " rows"]:
    """How far vectors lie from a span: the norm of what projection leaves, divided by the vector's norm.

    Args:
        vectors: float32.
        basis: float32, orthonormal columns.

    Returns:
        float32, from 0 (in the span) to 1 (orthogonal to it); not a number for a zero vector.

    Example:
        >>> span_distance(torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([0.0000, 0.8000])
    """
    residual = vectors - (vectors @ basis) @ basis.T
    return residual.norm(dim=1) / vectors.norm(dim=1)


def is_full(basis: Float[Tensor, "width rank"]) -> bool:
    """Whether a span is so large that every vector lies in it.

    A layer norm without bias leaves its vectors no mean: they fill one dimension less than the width.

    Args:
        basis: float32, orthonormal columns.
    """
    width, rank = basis.shape
    return rank >= width - 1


@dataclass(frozen=True)
class TextbookSpans:
    """What the gradients of blocks 0 and 1 tell: the spans of what enters their attention.

    Attributes:
        taps: The two taps.
        bases: float32, width x rank, for each of them.
        parameters_used: Number of gradient entries that were read.
    """

    taps: tuple[Tap, Tap]
    bases: tuple[Float[Tensor, "width _"], Float[Tensor, "width _"]]
    parameters_used: int

    @property
    def ranks(self) -> tuple[int, int]:
        """The ranks of blocks 0 and 1."""
        return self.bases[0].shape[1], self.bases[1].shape[1]

    def verdict(self) -> tuple[Status, str] | None:
        """Status and diagnosis where no search can answer, else None."""
        if 0 in self.ranks:
            block = self.ranks.index(0)
            return Status.NO_SIGNAL, f"block {block}'s query, key and value gradients are missing or zero"
        if any(is_full(basis) for basis in self.bases):
            return Status.SATURATED, f"ranks {self.ranks[0]} and {self.ranks[1]} leave no vector outside a span"
        return None


def textbook_spans(
    model: LanguageModel,
    adapter: Adapter,
    update: Update,
    rank_tolerance: float | None = None,
    rank_cutoff: int = 0,
) -> TextbookSpans:
    """The spans of blocks 0 and 1, from the stacked gradients of query, key and value.

    Args:
        model: The model both sides know.
        adapter: Its architecture.
        update: What the client sent.
        rank_tolerance: See `textbook_span`.
        rank_cutoff: See `textbook_span`.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: The model has one block only.
    """
    if adapter.num_blocks < 2:
        raise DagerError(f"model {model.name!r} has one block: the textbook attack needs two, load more of it")
    gradients = {name: tensor.to(model.device) for name, tensor in update.for_backbone(model.network).items()}
    taps = adapter.tap(0, QKV), adapter.tap(1, QKV)
    first, second = (
        textbook_span(_gradient(tap, gradients, model.hidden_size), rank_tolerance, rank_cutoff).to(model.device)
        for tap in taps
    )
    used = sum(gradients[name].numel() for tap in taps for name in tap.parameters if name in gradients)
    return TextbookSpans(taps, (first, second), used)


def _gradient(tap: Tap, gradients: Mapping[str, Tensor], width: int) -> Float[Tensor, "outputs width"]:
    """The stacked gradient of a tap, a row of zeros where nothing of it was shared."""
    gradient = tap.gradient(gradients)
    return torch.zeros(1, width) if gradient is None else gradient
