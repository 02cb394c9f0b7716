"""Which tokens and positions an update's embeddings name: the rows that are not zero (chapter `12_federated`).

A token that is in no text has an embedding gradient of exactly zero, unless the embedding is the output map, too: then
a loss over the vocabulary gives every token a row, and nothing is read off it.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.token_filter import Candidates


def named_tokens(evidence: Evidence) -> Int[Tensor, " tokens"] | None:
    """The tokens whose rows of the embedding gradient stand out.

    Args:
        evidence: The update's gradients.

    Returns:
        int64, sorted; None where the gradient was not shared or names no tokens.
    """
    return _named(evidence, evidence.adapter.first_input.tokens)


def named_positions(evidence: Evidence) -> int | None:
    """How many positions the longest text has, by the rows of the position embeddings' gradient.

    Args:
        evidence: The update's gradients.

    Returns:
        None where the model has none, or their gradient was not shared or names none.
    """
    positions = evidence.adapter.first_input.positions
    named = None if positions is None else _named(evidence, positions)
    return None if named is None else int(named[-1]) + 1


def _named(evidence: Evidence, table: Tensor) -> Tensor | None:
    """The rows of an embedding's gradient that stand out."""
    names = (name for name, each in evidence.adapter.network.named_parameters() if each is table)
    gradient = evidence.gradients.get(next(names, ""))
    if gradient is None:
        return None
    sizes = gradient.float().norm(dim=1)
    if bool(sizes.max() == 0) or 2 * int((sizes > 0).sum()) > len(sizes):
        return None
    # What was subtracted from a gradient leaves rounding where a row was.
    return (sizes > constants().row_rounding * sizes[sizes > 0].median()).nonzero()[:, 0]


def among(candidates: Candidates, tokens: Int[Tensor, " tokens"]) -> Candidates:
    """The candidates that are among some tokens.

    Args:
        candidates: Tokens that may stand at each position.
        tokens: int64.
    """
    kept = tuple(each[torch.isin(each, tokens.to(each.device))] for each in candidates.tokens)
    while len(kept) > 1 and not len(kept[-1]):
        kept = kept[:-1]
    return Candidates(kept, candidates.every_position)


def anywhere(tokens: Int[Tensor, " tokens"], positions: int | None) -> Candidates:
    """Some tokens at every position.

    Args:
        tokens: int64.
        positions: How many positions there are; None for a rotary model, where one entry holds for all.
    """
    return Candidates((tokens,) * (positions or 1), every_position=positions is None)
