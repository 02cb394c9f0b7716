"""The BERT family: bidirectional, absolute positions, a layer norm after the embeddings and after each part."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from .base import ATTENTION_OUTPUT, MLP, QKV, QUERY, Adapter, FirstInput


class BertAdapter(Adapter):
    """Adapter of `model_type` bert: its taps and its embeddings."""

    causal = False

    @property
    def blocks(self) -> Any:
        """The transformer blocks in order, an `nn.ModuleList`."""
        return self.network.encoder.layer

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""
        return int(self.config.max_position_embeddings)

    @cached_property
    def first_input(self) -> FirstInput:
        """The factors of block 0's attention input; the token type of a single text is part of the positions."""
        embeddings = self.network.embeddings
        positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        norm = embeddings.LayerNorm
        tokens = embeddings.word_embeddings.weight
        return FirstInput(tokens, positions, norm.weight, norm.bias, norm.eps, centred=True)

    def linear_maps(self, block: int, kind: str) -> tuple[nn.Module, ...]:
        """The linear modules that read the tap `kind` of a block."""
        part = self.blocks[block]
        attention = part.attention.self
        return {
            QKV: (attention.query, attention.key, attention.value),
            QUERY: (attention.query,),
            ATTENTION_OUTPUT: (part.attention.output.dense,),
            MLP: (part.intermediate.dense,),
        }[kind]
