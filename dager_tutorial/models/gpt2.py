"""The GPT-2 family: absolute positions, layer norms before each part, one fused query-key-value map."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.adapter import DecoderAdapter, RowProjections, Rows
from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT


class GPT2Adapter(DecoderAdapter):
    """Adapter of `model_type` gpt2."""

    input_first = True  # Conv1D stores its weight inputs x outputs

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__(network)
        self.num_heads = self.num_key_heads = int(self.config.n_head)
        self.head_width = self.hidden_size // self.num_heads

    @property
    def blocks(self) -> Any:
        """The transformer blocks in order, an `nn.ModuleList`."""
        return self.network.h

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""
        return int(self.config.n_positions)

    @cached_property
    def first_input(self) -> FirstInput:
        """The factors of block 0's attention input."""
        norm = self.blocks[0].ln_1
        return FirstInput(
            self.network.wte.weight, self.network.wpe.weight, norm.weight, norm.bias, norm.eps, centred=True
        )

    @property
    def position_table(self) -> tuple[nn.Parameter, int]:
        """The learned positions and the row that a text's first token has."""
        return self.network.wpe.weight, 0

    def linear_maps(self, block: int, kind: str) -> tuple[nn.Module, ...]:
        """The linear modules that read the tap `kind` of a block."""
        part = self.blocks[block]
        return {
            ATTENTION_OUTPUT: (part.attn.c_proj,),
            MLP: (part.mlp.c_fc,),
            MLP_OUTPUT: (part.mlp.c_proj,),
        }.get(kind, (part.attn.c_attn,))

    def embed(self, token_ids: Int[Tensor, " rows"], position: int) -> Rows:
        """Hidden states (tokens x width) that tokens (int64) have before block 0 at a position."""
        return self.network.wte(token_ids) + self.network.wpe.weight[position]

    def attention_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter query, key and value of a block."""
        return self.blocks[block].ln_1(hidden)

    def query_key_value(self, block: int, vectors: Rows) -> RowProjections:
        """Query, key and value (rows x heads x width)."""
        parts = self.blocks[block].attn.c_attn(vectors).split(self.hidden_size, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, self.head_width)) for part in parts)
        return query, key, value

    def scaling(self, block: int) -> float:
        """The factor on query-key products."""
        return float(self.blocks[block].attn.scaling)

    def after_attention(self, block: int, hidden: Rows, attended: Float[Tensor, "rows inputs"]) -> Rows:
        """Hidden states (rows x width) after the attention's output map and residual."""
        return hidden + self.blocks[block].attn.c_proj(attended)

    def mlp_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter the MLP."""
        return self.blocks[block].ln_2(hidden)

    def after_mlp(self, block: int, hidden: Rows, vectors: Rows) -> Rows:
        """Hidden states (rows x width) after the MLP of `vectors` and the residual."""
        return hidden + self.blocks[block].mlp(vectors)
