"""Block 0's attention input as factors: a token's part, a position's part, the norm that joins them.

Chapter `05_token_filter`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FirstInput:
    """How block 0's attention input comes about: `gain * (u - mean(u)) / deviation(u) + bias`, u = token + position.

    Attributes:
        tokens: float32, the token embeddings.
        positions: float32, the position embeddings (with the token type of a single text where there is one), or None
            for rotary models.
        gain: float32.
        bias: float32, or None.
        epsilon: Added to the variance.
        centred: False for an RMS norm, which subtracts no mean.
    """

    tokens: Float[Tensor, "vocabulary width"]
    positions: Float[Tensor, "positions width"] | None
    gain: Float[Tensor, " width"]
    bias: Float[Tensor, " width"] | None
    epsilon: float
    centred: bool

    def of(self, tokens: Int[Tensor, " some"]) -> FirstInput:
        """The factors of a smaller vocabulary.

        Args:
            tokens: int64 token ids, which the new ids index.
        """
        return replace(self, tokens=self.tokens[tokens.to(self.tokens.device)])

    def linear(self, embedding: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """The linear part of the norm: `gain * (u - mean(u))`."""
        return self.spread(embedding) * self.gain.to(embedding)

    def spread(self, embedding: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """`u - mean(u)`, or u itself for an RMS norm: what the deviation is computed from."""
        return embedding - embedding.mean(-1, keepdim=True) if self.centred else embedding

    def vectors(
        self, tokens: Int[Tensor, " pairs"], positions: Int[Tensor, " pairs"] | None
    ) -> Float[Tensor, "pairs width"]:
        """Inputs of block 0's attention for token-position pairs (chapter `05_token_filter`).

        Args:
            tokens: int64 token ids.
            positions: int64 positions; None for rotary models.

        Returns:
            float32.
        """
        embedding = self.tokens[tokens]
        if self.positions is not None and positions is not None:
            embedding = embedding + self.positions[positions]
        return self.normed(embedding)

    def normed(self, embedding: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """The norm of sums of a token's and a position's part: what enters block 0's attention."""
        spread = self.spread(embedding)
        vectors = spread / (spread.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self.gain
        return vectors if self.bias is None else vectors + self.bias
