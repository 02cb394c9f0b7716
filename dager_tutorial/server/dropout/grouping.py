"""Which rows of a batch make up a text: those whose queries' gradients are made of each other's keys.

Chapter `14_defences`.

The gradient of a query is a combination of the keys that it saw, those of its own text up to itself, whatever dropout
did to the attention. Rows that are known give the gradient of every query (the gradient of block 0's maps is linear in
them) and every key; so a text goes on with the row whose query's gradient lies in the keys of that text, head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import QKV, precise
from dager_tutorial.server.dropout.rows import Row
from dager_tutorial.server.evidence import Evidence


@dataclass(frozen=True)
class Chain:
    """The rows of one text, in their order.

    Attributes:
        rows: Their places among all rows.
        misfits: For each but the first, the share of its query's gradient outside the text's keys.
        rivals: The least such share with another text's keys; infinite where there is no other.
    """

    rows: tuple[int, ...]
    misfits: tuple[float, ...] = ()
    rivals: tuple[float, ...] = ()


def chains(evidence: Evidence, rows: Sequence[Row]) -> list[Chain]:
    """Put rows together to texts, position by position.

    Args:
        evidence: The update's gradients.
        rows: All rows of the batch, as far as they are known.
    """
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    queries, keys = _queries_and_keys(evidence, adapter, rows)
    found: list[Chain] = []
    for position in range(max((row.position for row in rows), default=-1) + 1):
        here = [place for place, row in enumerate(rows) if row.position == position]
        if not position:
            found = [Chain((place,)) for place in here]
            continue
        alive = [chain for chain in found if len(chain.rows) == position]
        if not alive:
            break
        longer = _assigned(alive, here, queries, keys)
        found = [longer.get(chain.rows, chain) for chain in found]
    return found


def _queries_and_keys(evidence: Evidence, adapter: DecoderAdapter, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The gradients of all rows' queries, and their keys (float64, rows x heads x width)."""
    vectors = torch.stack([row.vector for row in rows])
    gradient = adapter.tap(0, QKV).gradient(evidence.gradients)
    assert gradient is not None
    outputs = torch.linalg.pinv(precise(vectors).T) @ gradient.T
    shape = (adapter.num_heads, adapter.head_width)
    queries = outputs[:, : adapter.num_heads * adapter.head_width].unflatten(1, shape)
    with torch.no_grad():
        _, keys, _ = adapter.query_key_value(0, vectors)
    return queries, precise(keys)


def _assigned(alive: list[Chain], here: list[int], queries: Tensor, keys: Tensor) -> dict[tuple[int, ...], Chain]:
    """Texts with the rows of the next position that fit them best, each row in one text."""
    misfits = torch.tensor([[_misfit((*chain.rows, row), queries, keys) for row in here] for chain in alive])
    longer = {}
    for text, choice in zip(*linear_sum_assignment(misfits.clamp(min=1e-12).log().numpy()), strict=True):
        chain, others = alive[text], [*misfits[:text, choice], *misfits[text + 1 :, choice]]
        rival = float(min(others, default=torch.tensor(torch.inf)))
        longer[chain.rows] = Chain(
            (*chain.rows, here[choice]),
            (*chain.misfits, float(misfits[text, choice])),
            (*chain.rivals, rival),
        )
    return longer


def _misfit(rows: tuple[int, ...], queries: Float[Tensor, "rows heads width"], keys: Tensor) -> float:
    """The share of the last row's query gradient that lies outside the keys of all, over all heads."""
    seen, asked = keys[list(rows)].permute(1, 2, 0), queries[rows[-1]][..., None]
    basis = torch.linalg.qr(seen).Q
    outside = asked - basis @ (basis.mT @ asked)
    return float(outside.square().sum() / asked.square().sum().clamp(min=1e-300))
