"""Which tokens a shared embedding gradient names: its rows that are not zero (chapter `11_limits`).

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
    gradient = evidence.gradients.get(_embedding(evidence))
    if gradient is None:
        return None
    sizes = gradient.float().norm(dim=1)
    if bool(sizes.max() == 0) or 2 * int((sizes > 0).sum()) > len(sizes):
        return None
    # What was subtracted from a gradient leaves rounding where a row was.
    return (sizes > constants().row_rounding * sizes[sizes > 0].median()).nonzero()[:, 0]


def _embedding(evidence: Evidence) -> str:
    """The name of the token embedding's parameter."""
    weight = evidence.adapter.network.get_input_embeddings().weight
    return next(name for name, each in evidence.adapter.network.named_parameters() if each is weight)


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
