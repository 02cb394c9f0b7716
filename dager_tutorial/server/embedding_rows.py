"""Which tokens and positions an update's embeddings name: the rows that are not zero (chapter `12_federated`).

A token that is in no text has an embedding gradient of exactly zero, unless the embedding is the output map, too: then
a loss over the vocabulary gives every token a row, and nothing is read off it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.deviation import deviation_of, outstanding
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.token_filter import Candidates


def named_tokens(evidence: Evidence) -> Int[Tensor, " tokens"] | None:
    """The tokens whose rows of the embedding gradient are not zero.

    Args:
        evidence: The update's gradients; Gaussian noise on them is measured, and what stands out from it is named.

    Returns:
        int64, sorted, with the one token whose row never moves where there is one; None where the gradient was not
        shared or names no tokens.
    """
    tokens = evidence.adapter.first_input.tokens
    named = _named(evidence, tokens)
    # More than half of a vocabulary is in no batch: every row moved, by noise, by weight decay, or as an output map's.
    if named is None or 2 * len(named) > len(tokens):
        return None
    silent = evidence.adapter.network.get_input_embeddings().padding_idx
    # PyTorch keeps the gradient of this row at zero, whatever the texts hold.
    return named if silent is None else torch.cat([named, named.new_tensor([silent])]).unique()


def named_positions(evidence: Evidence) -> int | None:
    """How many positions the longest text has, by the rows of the position embeddings' gradient.

    Args:
        evidence: The update's gradients.

    Returns:
        None where the model has none, or their gradient was not shared or names none.
    """
    table = evidence.adapter.position_table
    named = None if table is None else _named(evidence, table[0])
    if table is None or named is None or len(named) == len(table[0]):
        return None
    return int(named[-1]) + 1 - table[1]


def table_gradient(evidence: Evidence, table: Tensor) -> Float[Tensor, "rows width"] | None:
    """The gradient of an embedding's table, as it was shared; None where it was not.

    Args:
        evidence: The update's gradients.
        table: The parameter.
    """
    names = (name for name, each in evidence.adapter.network.named_parameters() if each is table)
    return evidence.gradients.get(next(names, ""))


def noise_of(evidence: Evidence) -> float | None:
    """The deviation of Gaussian noise on every entry of an update; None where there is none, or nothing tells it.

    Args:
        evidence: The update's gradients.
    """
    gradient = table_gradient(evidence, evidence.adapter.first_input.tokens)
    return None if gradient is None else deviation_of(gradient)


def _named(evidence: Evidence, table: Tensor) -> Tensor | None:
    """The rows of an embedding's gradient that are more than noise; None where none is, or some may have been lost."""
    gradient = table_gradient(evidence, table)
    if gradient is None:
        return None
    noise = noise_of(evidence)
    if noise is not None:
        named = outstanding(gradient, noise)
        return named if len(named) else None
    sizes = gradient.float().norm(dim=1)
    # What was subtracted from a gradient leaves rounding where a row was; nothing else does.
    least = constants().row_rounding * sizes[sizes > 0].median() if evidence.is_remainder and bool(sizes.any()) else 0.0
    named = (sizes > least).nonzero()[:, 0]
    return named if len(named) and _whole(gradient[named]) else None


def _whole(rows: Float[Tensor, "rows width"]) -> bool:
    """Whether no row can have been lost to small numbers that were set to zero: then others would be nearly empty."""
    return int((rows != 0).sum(1).min()) >= min(constants().fewest_entries, rows.shape[1])


def among(candidates: Candidates, tokens: Int[Tensor, " tokens"]) -> Candidates:
    """The candidates that are among some tokens.

    Args:
        candidates: Tokens that may stand at each position.
        tokens: int64.
    """
    kept = tuple(each[torch.isin(each, tokens.to(each.device))] for each in candidates.tokens)
    while len(kept) > 1 and not len(kept[-1]):
        kept = kept[:-1]
    return replace(candidates, tokens=kept)


def anywhere(tokens: Int[Tensor, " tokens"], positions: int | None) -> Candidates:
    """Some tokens at every position.

    Args:
        tokens: int64.
        positions: How many positions there are; None for a rotary model, where one entry holds for all.
    """
    return Candidates((tokens,) * (positions or 1), every_position=positions is None)
