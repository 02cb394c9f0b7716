"""Attention, written once: what every stage that replays a block does with queries, keys and values.

Leading dimensions, written `...`, are broadcast, so that one function serves rows with keys of their own, all queries
against the keys of one text, and all prefixes against all candidates. Grouped queries share a key (Llama): query
heads `k * g .. k * g + g - 1` read key head `k`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def scores(
    query: Float[Tensor, "... heads width"], keys: Float[Tensor, "... length key_heads width"], scaling: float
) -> Float[Tensor, "... heads length"]:
    """Scaled query-key products.

    Args:
        query: One query.
        keys: The keys that it may see.
        scaling: The factor on the products, usually `width ** -0.5`.
    """
    grouped = query.unflatten(-2, (keys.shape[-2], -1))
    return (torch.einsum("...kgw,...lkw->...kgl", grouped, keys) * scaling).flatten(-3, -2)


def weights(
    scores: Float[Tensor, "... heads length"], hidden: Bool[Tensor, "... length"] | None = None
) -> Float[Tensor, "... heads length"]:
    """The softmax over the keys, those that are hidden left out.

    Args:
        scores: What `scores` returns.
        hidden: True where a key is not to be seen; None for none.
    """
    if hidden is not None:
        scores = scores.masked_fill(hidden[..., None, :], -math.inf)
    return scores.softmax(-1)


def mix(
    weights: Float[Tensor, "... heads length"], values: Float[Tensor, "... length key_heads width"]
) -> Float[Tensor, "... inputs"]:
    """Weighted sums of values, the heads side by side: what enters the attention's output map.

    Args:
        weights: What `weights` returns.
        values: The values that belong to the keys.
    """
    grouped = weights.unflatten(-2, (values.shape[-2], -1))
    return torch.einsum("...kgl,...lkw->...kgw", grouped, values).flatten(-3)


def mix_beside(
    weights: Float[Tensor, "... heads length"],
    values: Float[Tensor, "... past key_heads width"],
    own: Float[Tensor, "... key_heads width"],
) -> Float[Tensor, "... inputs"]:
    """The same where the last key is one that each query has of its own, so that the others' values are not copied.

    Args:
        weights: What `weights` returns.
        values: The values that belong to all keys but the last.
        own: The value that belongs to the last.
    """
    return mix(weights[..., :-1], values).add_(mix(weights[..., -1:], own[..., None, :, :]))


def attend(
    query: Float[Tensor, "... heads width"],
    keys: Float[Tensor, "... length key_heads width"],
    values: Float[Tensor, "... length key_heads width"],
    scaling: float,
    hidden: Bool[Tensor, "... length"] | None = None,
) -> Float[Tensor, "... inputs"]:
    """Attention of one query over its keys: the input of the attention's output map.

    Args:
        query: One query.
        keys: The keys that it may see.
        values: The values that belong to the keys.
        scaling: The factor on query-key products.
        hidden: True where a key is not to be seen; None for none.

    Example:
        >>> keys = torch.eye(2)[:, None]  # 2 keys of one head
        >>> attend(torch.zeros(1, 2), keys, keys, 1.0)
        tensor([0.5000, 0.5000])
    """
    return mix(weights(scores(query, keys, scaling), hidden), values)


def unseen(length: int, starts: Int[Tensor, " rows"], window: int | None) -> Bool[Tensor, "rows length"]:
    """Which of a causal query's keys it does not see, its own key being the last.

    Args:
        length: How many keys there are, the query's own included.
        starts: int64, how many of the first keys belong to pads and not to the text.
        window: How many keys a query sees, itself included; None for all.
    """
    position = torch.arange(length, device=starts.device)
    hidden = position < starts[:, None]
    return hidden if window is None else hidden | (position < length - window)


def join(
    mixed: Float[Tensor, "... heads width"],
    log_sum: Float[Tensor, "... heads"],
    score: Float[Tensor, "... heads"],
    value: Float[Tensor, "... heads width"],
) -> Float[Tensor, "... heads width"]:
    """Attention over some keys and one more, from attention over these keys alone.

    A softmax over a union is the mean of the softmaxes over its parts, weighted by their normalisers. In logarithms
    nothing overflows.

    Args:
        mixed: Weighted sums of values over the keys so far.
        log_sum: Logarithm of the sum of exponentials of their scores.
        score: The score of the key that joins.
        value: Its value.
    """
    return mixed + (score - log_sum).sigmoid()[..., None] * (value - mixed)
