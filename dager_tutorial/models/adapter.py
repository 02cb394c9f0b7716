"""What the attack needs to know of an architecture.

An adapter names the linear maps whose inputs the attack tests (the *taps*) and runs one block of a transformer piece by
piece with its own submodules. It never copies a forward pass: the tests compare it with the unmodified model.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.models.tap import KINDS, MLP_OUTPUT, QKV, QUERY, Tap

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
    """Every input that was asked for has been read: the rest of the forward pass is not needed."""


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

    @property
    @abstractmethod
    def position_table(self) -> tuple[nn.Parameter, int] | None:
        """The learned positions and the row that a text's first token has; None for a rotary model."""

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
            kind: One of `KINDS`, `QUERY` or `MLP_OUTPUT`.
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

        Args:
            token_ids: int64, batch x length.
            attention_mask: int64, batch x length, 0 at pads.
            taps: Which inputs to read.
            starts: int64, batch, the position of each text's first token where it is not 0.

        Returns:
            For each tap, batch x length x inputs, in the network's dtype.
        """
        positions = self.position_ids(attention_mask)
        if starts is not None:
            positions = positions + starts[:, None]
        return self._tapped(taps, input_ids=token_ids, attention_mask=attention_mask, position_ids=positions)

    def _tapped(self, taps: Iterable[Tap], **inputs: Any) -> dict[Tap, Tensor]:
        """Inputs of linear maps during the unmodified forward pass, which ends as soon as the last was seen."""
        missing, seen = set(taps), dict[Tap, Tensor]()

        def keep(tap: Tap, vectors: Tensor) -> None:
            seen[tap] = vectors
            missing.discard(tap)
            if not missing:
                raise _AllSeen

        modules = {tap: self.linear_maps(tap.block, tap.kind)[0] for tap in missing}
        handles = [
            module.register_forward_pre_hook(lambda _, args, tap=tap: keep(tap, args[0]))
            for tap, module in modules.items()
        ]
        try:
            with contextlib.suppress(_AllSeen):
                self.network(**inputs)
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

    @torch.no_grad()
    def tree_inputs(
        self,
        token_ids: Int[Tensor, " nodes"],
        positions: Int[Tensor, " nodes"],
        sees: Bool[Tensor, "nodes nodes"],
        taps: Iterable[Tap],
    ) -> dict[Tap, Float[Tensor, "nodes _"]]:
        """The inputs of linear maps at every prefix of a tree, by one forward pass in which each stands once.

        The prefixes are one sequence to the unmodified network, and the mask says which of them each one sees: no
        pads, and what texts share is computed once.

        Args:
            token_ids: int64, each prefix's last token.
            positions: int64, where it stands.
            sees: For each prefix (rows) its own prefixes, itself included.
            taps: Which inputs to read.

        Returns:
            For each tap, nodes x inputs, in the network's dtype.
        """
        distance = positions[:, None] - positions
        windows = {block: self.window(block) for block in range(self.num_blocks)}
        masks = {
            window: self._additive(sees if window is None else sees & (distance < window))
            for window in set(windows.values())
        }
        mask: Any = next(iter(masks.values()))
        if len(masks) > 1:  # transformers takes one mask for each type of layer
            mask = {self.config.layer_types[block]: masks[window] for block, window in windows.items()}
        ids, places = token_ids[None], positions[None]
        found = self._tapped(taps, input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        return {tap: vectors[0] for tap, vectors in found.items()}

    def _additive(self, sees: Tensor) -> Tensor:
        """A mask as transformers adds it to scores (1 x 1 x queries x keys)."""
        mask = torch.zeros(sees.shape, dtype=self.network.dtype, device=sees.device)
        return mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)[None, None]

    @abstractmethod
    def embed(self, token_ids: Int[Tensor, " rows"], position: int) -> Rows:
        """Hidden states (tokens x width) that tokens (int64) have before block 0 at a position."""

    @abstractmethod
    def attention_input(self, block: int, hidden: Rows) -> Rows:
        """The normalised vectors (rows x width) that enter query, key and value of a block."""

    @abstractmethod
    def query_key_value(self, block: int, vectors: Rows) -> RowProjections:
        """Query (rows x heads x width), key and value (rows x key heads x width), the same at every position."""

    def placed(self, block: int, projections: RowProjections, position: int) -> RowProjections:
        """Query, key and value at a position: rotated, in rotary models."""
        return projections

    def project(self, block: int, vectors: Rows, position: int) -> RowProjections:
        """Query (rows x heads x width), key and value (rows x key heads x width) at a position, with its rotation."""
        return self.placed(block, self.query_key_value(block, vectors), position)

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

    def through_mlp(self, block: int, hidden: Rows, vectors: Rows) -> tuple[Float[Tensor, "rows activated"], Rows]:
        """What enters the MLP's output map (rows x activations), and `after_mlp` of the same."""
        seen: list[Tensor] = []
        (output,) = self.linear_maps(block, MLP_OUTPUT)
        hook = output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            after = self.after_mlp(block, hidden, vectors)
        finally:
            hook.remove()
        return seen[0], after


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
