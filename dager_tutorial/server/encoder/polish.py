"""A text that is nearly right made right: coordinate descent on what its rows leave outside the span.

Chapter `08_encoder_recovery`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dager_tutorial.models.attention import join, mix, scores, weights
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.tables import FirstBlock, Text


@dataclass(frozen=True)
class Polish:
    """Exchanges one token after the other.

    Attributes:
        block: Block 0's attention for every pair.
        wide: Which token may stand at which position.
        directions: float32, directions outside the span in which the rows are measured.
        budget: What it may cost.
    """

    block: FirstBlock
    wide: Bool[Tensor, "positions tokens"]
    directions: Float[Tensor, "heads width directions"]
    budget: Budget

    def polished(self, text: Text) -> Text:
        """Replace one token after the other by the one that leaves the least outside the span.

        Args:
            text: Indices of its tokens; two at least.
        """
        for _ in range(constants().sweeps):
            before, text = text, self._swept(text)
            if text == before or self.budget.late:
                break
        return text

    def _swept(self, text: Text) -> Text:
        """The text after one pass over its places."""
        for place in range(len(text)):
            choices = self.wide[place].nonzero()[:, 0]
            best = int(self.energies(text, place, choices).argmin())
            text = (*text[:place], int(choices[best]), *text[place + 1 :])
        return text

    def energies(self, text: Text, place: int, choices: Int[Tensor, " choices"]) -> Float[Tensor, " choices"]:
        """What all rows leave outside the span for each choice of the token at a place.

        Attention over the other tokens is computed once; each choice joins it.

        Args:
            text: Indices of its tokens; two at least.
            place: The place where a token is chosen.
            choices: int64, indices of the tokens to choose from.

        Returns:
            float32, the sum of the squares of all rows in the polish's directions.
        """
        others = self._others(text, place)
        part = self.budget.chunk(12 * others.mixed.numel())
        return torch.cat([self._energies(others, place, few) for few in choices.split(part)])

    def _others(self, text: Text, place: int) -> _Others:
        """The tokens that do not stand at a place."""
        rest = [other for other in range(len(text)) if other != place]
        query, key, value = (part[rest] for part in self.block.rows(text))
        measured = self._measured(value)
        return _Others(query, key, measured, *_attended(query, key, measured, self.block.scaling))

    def _measured(self, value: Tensor) -> Tensor:
        """What values (rows x heads x width) contribute to each direction (rows x heads x directions)."""
        return torch.einsum("rhw,hwd->rhd", value, self.directions)

    def _energies(self, others: _Others, place: int, choices: Tensor) -> Tensor:
        """What all rows leave outside the span (choices) with each choice at the place that is left."""
        block = self.block
        query, key, value = (part[place, choices] for part in (block.query, block.key, block.value))
        value = self._measured(value)
        score = scores(others.query, key, block.scaling)
        rows = _joined(others, score, value)
        own_score = scores(query, key[:, None], block.scaling)[..., 0]
        own = join(*_attended(query, others.key, others.value, block.scaling), own_score, value)
        return rows.square().sum((0, 2)) + own.sum(1).square().sum(1)


class _Others(NamedTuple):
    """All tokens of a text but one.

    Attributes:
        query: Rows x heads x width.
        key: The same.
        value: Rows x heads x directions.
        mixed: What their queries get of each other, rows x heads x directions.
        log_sum: Logarithms of the normalisers, rows x heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    log_sum: Tensor


def _joined(others: _Others, score: Tensor, value: Tensor) -> Tensor:
    """What the others' queries get, all heads together (rows x choices x directions), if a choice joins.

    The same as `join` and a sum over heads, as products of matrices: no table has all four dimensions.

    Args:
        others: The others.
        score: Rows x heads x choices.
        value: Choices x heads x directions.
    """
    share = (score - others.log_sum[..., None]).sigmoid()
    lost = share.transpose(1, 2) @ others.mixed
    gained = (share.permute(2, 0, 1) @ value).transpose(0, 1)
    return others.mixed.sum(1)[:, None] + gained - lost


def _attended(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What queries get of keys (rows x heads x directions), and the logarithm of each normaliser (rows x heads)."""
    products = scores(query, key, scaling)
    mixed = mix(weights(products), value).unflatten(-1, tuple(value.shape[1:]))
    return mixed, products.logsumexp(-1)
