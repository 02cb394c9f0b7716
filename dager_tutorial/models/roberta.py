"""The RoBERTa family: BERT's blocks; positions are counted from behind the padding token's row."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from jaxtyping import Int
from torch import Tensor, nn

from dager_tutorial.models.bert import BertAdapter
from dager_tutorial.models.first_input import FirstInput


class RobertaAdapter(BertAdapter):
    """Adapter of `model_type` roberta, xlm-roberta and camembert, whose blocks have the same structure."""

    @property
    def first_position(self) -> int:
        """The row of the position table that a text's first token has; those before it belong to no token."""
        return int(self.network.embeddings.padding_idx) + 1

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""
        return super().max_positions - self.first_position

    @cached_property
    def first_input(self) -> FirstInput:
        """The factors of block 0's attention input; row 0 of the positions is that of a text's first token."""
        factors = super().first_input
        assert factors.positions is not None
        return replace(factors, positions=factors.positions[self.first_position :])

    @property
    def position_table(self) -> tuple[nn.Parameter, int]:
        """The learned positions and the row that a text's first token has."""
        return self.network.embeddings.position_embeddings.weight, self.first_position

    def position_ids(self, attention_mask: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        """Positions (batch x length, int64) of the tokens of a mask, as the network counts them."""
        return super().position_ids(attention_mask) + self.first_position
