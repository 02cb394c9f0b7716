"""The proof of a text: every row must lie in the span of block 0's attention output and of deeper taps.

Chapter `08_encoder_recovery`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.attention import attend
from dager_tutorial.models.tap import Tap
from dager_tutorial.server.encoder.tables import FirstBlock, Text
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Confirmer:
    """Tests whole texts.

    Attributes:
        adapter: The architecture.
        tokens: Token ids by index.
        block: Block 0's attention for every pair.
        span: Span of block 0's attention output map.
        deeper: Spans of other taps that hold every row of the batch.
    """

    adapter: EncoderAdapter
    tokens: tuple[int, ...]
    block: FirstBlock
    span: Span
    deeper: Mapping[Tap, Span]

    def ids(self, text: Text) -> tuple[int, ...]:
        """Token ids of a text that is given by indices."""
        return tuple(self.tokens[token] for token in text)

    def ratios(self, text: Text) -> Float[Tensor, " length"]:
        """Residual ratio z (float32) of every row of a text at block 0's attention output.

        Args:
            text: Indices of its tokens.
        """
        query, key, value = self.block.rows(text)
        return self.span.ratio(attend(query, key, value, self.block.scaling))

    def confirms(self, text: Text) -> bool:
        """Whether every row of a text lies in the spans of all taps.

        Args:
            text: Indices of its tokens; one of no tokens has nothing that could be confirmed.
        """
        if not text or not bool((self.ratios(text) <= self.span.bound).all()):
            return False
        ids = torch.tensor([self.ids(text)], device=self.block.query.device)
        inputs = self.adapter.tap_inputs(ids, torch.ones_like(ids), self.deeper)
        return all(bool(span.holds(inputs[tap][0]).all()) for tap, span in self.deeper.items())
