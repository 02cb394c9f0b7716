"""What the attack needs to know of an architecture.

An adapter names the linear maps whose inputs the attack tests (the *taps*) and runs one block of a
transformer piece by piece with the block's own submodules. It never copies a forward pass: what it
computes is compared with the unmodified transformers model in the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import KINDS, QKV, QUERY, Tap

Rows = Float[Tensor, "rows width"]
"""Hidden states of a causal model, or the normalised vectors that enter its maps."""

RowProjections = tuple[
    Float[Tensor, "rows heads head_width"],
    Float[Tensor, "rows key_heads head_width"],
    Float[Tensor, "rows key_heads head_width"],
]
"""Query, key and value of such rows; several query heads may share a key head."""

Vectors = Float[Tensor, "*rows width"]
"""What enters a block or an MLP of a bidirectional model, with any leading dimensions."""

Projections = tuple[
    Float[Tensor, "*rows heads head_width"],
    Float[Tensor, "*rows heads head_width"],
    Float[Tensor, "*rows heads head_width"],
]
"""Query, key and value of such vectors."""


class _AllSeen(Exception):
    """All that was wanted of a forward pass was seen."""


class Adapter(ABC):
    """One architecture family. Subclasses are leaves and say where its submodules are.

    Args:
        network: The headless backbone.
    """

    causal: bool
    input_first = False

    def __init__(self, network: PreTrainedModel) -> None:
        # Any: the submodules differ from family to family, and transformers declares them as tensors or modules.
        self.network: Any = network
        self.config = network.config

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The transformer blocks in order, an `nn.ModuleList`."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""

    @cached_property
    @abstractmethod
    def first_input(self) -> FirstInput:
        """The factors of block 0's attention input."""

    @abstractmethod
    def linear_maps(self, block: int, kind: str) -> tuple[nn.Module, ...]:
        """The linear modules that read the tap `kind` of a block."""

    @cached_property
    def _weight_names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.network.named_parameters()}

    def tap(self, block: int, kind: str) -> Tap:
        """The tap of a block.

        Args:
            block: Index of the block, from 0.
            kind: One of `KINDS`, or `QUERY`.
        """
        names = tuple(self._weight_names[id(linear.weight)] for linear in self.linear_maps(block, kind))
        fused = kind == QUERY and len(self.linear_maps(block, QKV)) == 1
        return Tap(block, kind, names, self.input_first, self.hidden_size if fused else None)

    def taps(self) -> list[Tap]:
        """All taps, block by block."""
        return [self.tap(block, kind) for block in range(self.num_blocks) for kind in KINDS]

    def position_ids(self, attention_mask: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        """The `position_ids` of a mask's tokens (batch x length, int64), counted from 0 at each text's first token."""
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def tap_inputs(
        self,
        token_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"],
        taps: Iterable[Tap],
        *,
        starts: Int[Tensor, " batch"] | None = None,
    ) -> dict[Tap, Float[Tensor, "batch length _"]]:
        """Run the unmodified forward pass and read the inputs of linear maps through forward pre-hooks.

        The pass ends with the last of them.

        Args:
            token_ids: int64, batch x length.
            attention_mask: int64, batch x length, 0 at pads.
            taps: Which inputs to read.
            starts: int64, batch, the position of each text's first token where it is not 0.

        Returns:
            For each tap, batch x length x inputs, in the network's dtype.
        """
        seen: dict[Tap, Tensor] = {}
        wanted = set(taps)

        def look(tap: Tap, args: tuple[Tensor, ...]) -> None:
            seen[tap] = args[0]
            if len(seen) == len(wanted):
                raise _AllSeen

        maps = {tap: self.linear_maps(tap.block, tap.kind)[0] for tap in wanted}
        handles = [
            each.register_forward_pre_hook(lambda _, args, tap=tap: look(tap, args)) for tap, each in maps.items()
        ]
        positions = self.position_ids(attention_mask)
        if starts is not None:
            positions = positions + starts[:, None]
        try:
            with suppress(_AllSeen):
                self.network(input_ids=token_ids, attention_mask=attention_mask, position_ids=positions)
        finally:
            for handle in handles:
                handle.remove()
        return seen


class DecoderAdapter(Adapter):
    """A causal model with pre-norm blocks, run one position at a time over cached keys and values."""

    causal = True
    num_heads: int
    num_key_heads: int
    head_width: int

    @abstractmethod
    def embed(self, token_ids: Int[Tensor, " rows"], position: int) -> Rows:
        """Hidden states (tokens x width) that tokens (int64) have before block 0 at a position."""

    @abstractmethod
    def attention_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter query, key and value of a block."""

    @abstractmethod
    def project(self, block: int, vectors: Rows, position: int) -> RowProjections:
        """Query (rows x heads x width), key and value (rows x key heads x width) at a position, with its rotation."""

    @abstractmethod
    def scaling(self, block: int) -> float:
        """The factor on query-key products."""

    def window(self, block: int) -> int | None:
        """How many keys a query sees, itself included; None for all."""
        return None

    @abstractmethod
    def after_attention(self, block: int, hidden: Rows, attended: Float[Tensor, "rows inputs"]) -> Rows:
        """Hidden states (rows x width) after the output map of `attended` (rows x heads * width) and the residual."""

    @abstractmethod
    def mlp_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter the MLP."""

    @abstractmethod
    def after_mlp(self, block: int, hidden: Rows, vectors: Rows) -> Rows:
        """Hidden states (rows x width) after the MLP of `vectors` and the residual."""


class EncoderAdapter(Adapter):
    """A bidirectional model with post-norm blocks, run piece by piece.

    A block's input is what enters its query, key and value maps; block 0's is `first_input`. All vectors are in
    the network's dtype; `...` stands for any leading dimensions.
    """

    causal = False
    num_heads: int
    head_width: int

    @abstractmethod
    def project(self, block: int, vectors: Vectors) -> Projections:
        """Query, key and value (... x heads x head width) of a block's inputs (... x width)."""

    @abstractmethod
    def scaling(self, block: int) -> float:
        """The factor on query-key products."""

    @abstractmethod
    def after_attention(self, block: int, hidden: Vectors, attended: Float[Tensor, "*rows inputs"]) -> Vectors:
        """What enters the MLP (... x width).

        Args:
            block: Index of the block, from 0.
            hidden: ... x width, the block's inputs.
            attended: ... x (heads * head width), what enters the attention's output map.
        """

    @abstractmethod
    def after_mlp(self, block: int, vectors: Vectors) -> Vectors:
        """The next block's inputs (... x width), of the vectors that enter the MLP (... x width)."""
