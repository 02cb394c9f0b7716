"""The DistilBERT family: BERT's blocks under other names, without token types."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.adapter import EncoderAdapter, Projections, Vectors
from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, QUERY


class DistilBertAdapter(EncoderAdapter):
    """Adapter of `model_type` distilbert."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__(network)
        self.num_heads = int(self.config.num_attention_heads)
        self.head_width = self.hidden_size // self.num_heads

    @property
    def blocks(self) -> Any:
        """The transformer blocks in order, an `nn.ModuleList`."""
        return self.network.transformer.layer

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""
        return int(self.config.max_position_embeddings)

    @cached_property
    def first_input(self) -> FirstInput:
        """The factors of block 0's attention input."""
        embeddings = self.network.embeddings
        tokens, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
        norm = embeddings.LayerNorm
        return FirstInput(tokens, positions, norm.weight, norm.bias, norm.eps, centred=True)

    @property
    def position_table(self) -> tuple[nn.Parameter, int]:
        """The learned positions and the row that a text's first token has."""
        return self.network.embeddings.position_embeddings.weight, 0

    def linear_maps(self, block: int, kind: str) -> tuple[nn.Module, ...]:
        """The linear modules that read the tap `kind` of a block."""
        part = self.blocks[block]
        attention = part.attention
        return {
            QKV: (attention.q_lin, attention.k_lin, attention.v_lin),
            QUERY: (attention.q_lin,),
            ATTENTION_OUTPUT: (attention.out_lin,),
            MLP: (part.ffn.lin1,),
            MLP_OUTPUT: (part.ffn.lin2,),
        }[kind]

    def project(self, block: int, vectors: Vectors) -> Projections:
        """Query, key and value (... x heads x head width) of a block's inputs (... x width)."""
        query, key, value = (
            linear(vectors).unflatten(-1, (self.num_heads, self.head_width)) for linear in self.linear_maps(block, QKV)
        )
        return query, key, value

    def scaling(self, block: int) -> float:
        """The factor on query-key products."""
        return float(self.blocks[block].attention.scaling)

    def after_attention(self, block: int, hidden: Vectors, attended: Float[Tensor, "*rows inputs"]) -> Vectors:
        """What enters the MLP (... x width): output map, residual and layer norm."""
        part = self.blocks[block]
        return part.sa_layer_norm(part.attention.out_lin(attended) + hidden)

    def after_mlp(self, block: int, vectors: Vectors) -> Vectors:
        """The next block's inputs (... x width): MLP, residual and layer norm."""
        part = self.blocks[block]
        return part.output_layer_norm(part.ffn(vectors) + vectors)
