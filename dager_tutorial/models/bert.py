"""The BERT family: bidirectional, absolute positions, a layer norm after the embeddings and after each part."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.adapter import EncoderAdapter, Projections, Vectors
from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, QUERY


class BertAdapter(EncoderAdapter):
    """Adapter of `model_type` bert."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__(network)
        attention = self.blocks[0].attention.self
        self.num_heads = int(attention.num_attention_heads)
        self.head_width = int(attention.attention_head_size)

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

    @property
    def position_table(self) -> tuple[nn.Parameter, int]:
        """The learned positions and the row that a text's first token has."""
        return self.network.embeddings.position_embeddings.weight, 0

    def linear_maps(self, block: int, kind: str) -> tuple[nn.Module, ...]:
        """The linear modules that read the tap `kind` of a block."""
        part = self.blocks[block]
        attention = part.attention.self
        return {
            QKV: (attention.query, attention.key, attention.value),
            QUERY: (attention.query,),
            ATTENTION_OUTPUT: (part.attention.output.dense,),
            MLP: (part.intermediate.dense,),
            MLP_OUTPUT: (part.output.dense,),
        }[kind]

    def project(self, block: int, vectors: Vectors) -> Projections:
        """Query, key and value (... x heads x head width) of a block's inputs (... x width)."""
        attention = self.blocks[block].attention.self
        query, key, value = (
            linear(vectors).unflatten(-1, (self.num_heads, self.head_width))
            for linear in (attention.query, attention.key, attention.value)
        )
        return query, key, value

    def scaling(self, block: int) -> float:
        """The factor on query-key products."""
        return float(self.blocks[block].attention.self.scaling)

    def after_attention(self, block: int, hidden: Vectors, attended: Float[Tensor, "*rows inputs"]) -> Vectors:
        """What enters the MLP (... x width): output map, residual and layer norm."""
        return self.blocks[block].attention.output(attended, hidden)

    def after_mlp(self, block: int, vectors: Vectors) -> Vectors:
        """The next block's inputs (... x width): MLP, residual and layer norm."""
        part = self.blocks[block]
        return part.output(part.intermediate(vectors), vectors)
