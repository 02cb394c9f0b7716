"""The proof of a text: every row must lie in the span of block 0's attention output and of deeper taps.

Where these are full there is still the last block. A loss that reads one row of each text leaves as many rows there as
there are texts, and a text's row depends on all of its tokens.

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
from dager_tutorial.models.tap import ATTENTION_OUTPUT, Tap
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

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What confirms."""
        return (self.adapter.tap(0, ATTENTION_OUTPUT), *self.deeper)

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


@dataclass(frozen=True)
class LastConfirmer:
    """Tests whole texts by the one row that the loss reads of each, at position 0.

    Attributes:
        adapter: The architecture.
        tokens: Token ids by index.
        last: Spans of the last block's taps, with a rank that is clear and far from full.
        device: Where the network is.
    """

    adapter: EncoderAdapter
    tokens: tuple[int, ...]
    last: Mapping[Tap, Span]
    device: torch.device

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What confirms."""
        return tuple(self.last)

    @property
    def rank(self) -> int:
        """How many texts there are."""
        return max(span.rank for span in self.last.values())

    def ids(self, text: Text) -> tuple[int, ...]:
        """Token ids of a text that is given by indices."""
        return tuple(self.tokens[token] for token in text)

    def ratios(self, text: Text) -> Float[Tensor, " taps"]:
        """Residual ratio z (float32) of a text's first row at each tap.

        Args:
            text: Indices of its tokens, one at least.
        """
        ids = torch.tensor([self.ids(text)], device=self.device)
        inputs = self.adapter.tap_inputs(ids, torch.ones_like(ids), self.last)
        return torch.cat([span.ratio(inputs[tap][0, :1]) for tap, span in self.last.items()])

    def confirms(self, text: Text) -> bool:
        """Whether the text's first row lies in the spans of all taps.

        Args:
            text: Indices of its tokens; one of no tokens has nothing that could be confirmed.
        """
        if not text:
            return False
        return all(z <= span.bound for z, span in zip(self.ratios(text).tolist(), self.last.values(), strict=True))
