"""The Llama family: rotary positions, RMS norms, grouped query heads, separate query, key and value maps."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dager_tutorial.models.adapter import DecoderAdapter, RowProjections, Rows
from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, QUERY


class LlamaAdapter(DecoderAdapter):
    """Adapter of `model_type` llama, mistral, qwen2 and smollm3, whose blocks have the same structure."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__(network)
        attention = self.blocks[0].self_attn
        self.num_heads = int(self.config.num_attention_heads)
        self.num_key_heads = int(self.config.num_key_value_heads)
        self.head_width = int(attention.head_dim)

    @property
    def blocks(self) -> Any:
        """The transformer blocks in order, an `nn.ModuleList`."""
        return self.network.layers

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""
        return int(self.config.max_position_embeddings)

    @cached_property
    def first_input(self) -> FirstInput:
        """The factors of block 0's attention input: a token's alone, as rotary positions enter later."""
        norm = self.blocks[0].input_layernorm
        tokens = self.network.embed_tokens.weight
        return FirstInput(tokens, None, norm.weight, None, norm.variance_epsilon, centred=False)

    @property
    def position_table(self) -> None:
        """There is none."""
        return None

    def linear_maps(self, block: int, kind: str) -> tuple[nn.Module, ...]:
        """The linear modules that read the tap `kind` of a block."""
        attention, mlp = self.blocks[block].self_attn, self.blocks[block].mlp
        return {
            QKV: (attention.q_proj, attention.k_proj, attention.v_proj),
            QUERY: (attention.q_proj,),
            ATTENTION_OUTPUT: (attention.o_proj,),
            MLP: (mlp.gate_proj, mlp.up_proj),
            MLP_OUTPUT: (mlp.down_proj,),
        }[kind]

    def embed(self, token_ids: Int[Tensor, " rows"], position: int) -> Rows:
        """Hidden states (tokens x width) that tokens (int64) have before block 0, the same at every position."""
        return self.network.embed_tokens(token_ids)

    def attention_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter query, key and value of a block."""
        return self.blocks[block].input_layernorm(hidden)

    def query_key_value(self, block: int, vectors: Rows) -> RowProjections:
        """Query (rows x heads x width), key and value (rows x key heads x width), not yet rotated."""
        attention = self.blocks[block].self_attn
        query, key, value = (
            linear(vectors).unflatten(-1, (-1, self.head_width))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key, value

    def placed(self, block: int, projections: RowProjections, position: int) -> RowProjections:
        """Query and key rotated, and the value."""
        query, key, value = projections
        if getattr(self.blocks[block].self_attn, "use_rope", True):  # some blocks of smollm3 see no positions at all
            places = torch.full((1, 1), position, device=value.device)
            cosine, sine = self.network.rotary_emb(value, places)
            query, key = apply_rotary_pos_emb(query, key, cosine[0], sine[0])
        return query, key, value

    def scaling(self, block: int) -> float:
        """The factor on query-key products."""
        return float(self.blocks[block].self_attn.scaling)

    def window(self, block: int) -> int | None:
        """How many keys a query sees, itself included; None for all."""
        attention = self.blocks[block].self_attn
        if hasattr(attention, "sliding_window"):
            return attention.sliding_window
        return getattr(self.config, "sliding_window", None)

    def after_attention(self, block: int, hidden: Rows, attended: Float[Tensor, "rows inputs"]) -> Rows:
        """Hidden states (rows x width) after the attention's output map and residual."""
        return hidden + self.blocks[block].self_attn.o_proj(attended)

    def mlp_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter the MLP."""
        return self.blocks[block].post_attention_layernorm(hidden)

    def after_mlp(self, block: int, hidden: Rows, vectors: Rows) -> Rows:
        """Hidden states (rows x width) after the MLP of `vectors` and the residual."""
        return hidden + self.blocks[block].mlp(vectors)
