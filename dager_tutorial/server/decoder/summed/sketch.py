"""A quick look at every extension: the weakest bands of block 0's spectra (chapter `11_limits`).

The input of block 0's MLP is a norm of the hidden state, which is linear in what the heads add. Its coefficients are
therefore sums of contributions of single keys, known beforehand and weighted by attention; those of the input of the
attention's output map likewise. Lengths are estimated from random directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension
from dager_tutorial.server.decoder.summed.spectra import Bands, log_shares


@dataclass(frozen=True)
class Sketch:
    """Directions as block 0's hidden states and heads see them, in five parts.

    The weakest directions at the MLP's input, random ones for its length, random ones for the hidden state's deviation;
    the weakest directions at the attention's output map, random ones for its length.

    Attributes:
        adapter: The architecture.
        hidden: float32, what hidden states add to the parts.
        constant: float32, what the attention's bias adds.
        bias: float32, what the norm's bias adds.
        heads: float32, what the heads add.
        edges: Where the bands of the weakest directions begin and end.
    """

    adapter: DecoderAdapter
    hidden: Float[Tensor, "width directions"]
    constant: Float[Tensor, " directions"]
    bias: Float[Tensor, " directions"]
    heads: Float[Tensor, "heads head_width directions"]
    edges: tuple[int, ...]

    @classmethod
    def of(cls, adapter: DecoderAdapter, mlp: Bands, attention: Bands, generator: torch.Generator) -> Sketch:
        """Choose directions.

        Args:
            adapter: The architecture.
            mlp: The spectrum at block 0's MLP.
            attention: The spectrum at its attention's output map.
            generator: Source of randomness, on the CPU.
        """
        width, like = adapter.hidden_size, mlp.directions
        edges = mlp.edges[: constants().screened_bands + 1]
        gain, bias, centred = _norm(adapter, like)
        seen = torch.cat([mlp.directions[:, : edges[-1]], _random(width, like, generator)], 1)
        of_hidden = torch.cat([gain[:, None] * seen, _random(width, like, generator)], 1)
        of_hidden = of_hidden - of_hidden.mean(0) if centred else of_hidden
        of_attended = torch.cat(
            [attention.directions[:, : edges[-1]], _random(len(attention.directions), like, generator)], 1
        )
        zero, outputs = _output_map(adapter, like)
        rest = of_attended.shape[1]
        heads = torch.cat([outputs @ of_hidden, of_attended], 1)
        return cls(
            adapter,
            functional.pad(of_hidden, (0, rest)),
            functional.pad(zero @ of_hidden, (0, rest)),
            functional.pad(bias @ seen, (0, of_hidden.shape[1] - seen.shape[1] + rest)),
            heads.unflatten(0, (adapter.num_heads, adapter.head_width)),
            edges,
        )

    def log_shares(
        self,
        extension: Extension,
        shares: Float[Tensor, "candidates heads keys"],
        past: Float[Tensor, "before key_heads head_width"],
    ) -> Float[Tensor, "candidates features"]:
        """What the sketch sees of candidates behind one prefix (float32).

        Args:
            extension: The candidates, whose values' contributions are those of `heads`.
            shares: Their attention weights, the own key last.
            past: The values that they see beside their own.
        """
        groups = self.adapter.num_heads // self.adapter.num_key_heads
        contributions = torch.einsum("lhw,hwn->hln", past.repeat_interleave(groups, 1), self.heads)
        mixed = shares[..., :-1].flatten(1) @ contributions.flatten(0, 1) + (shares[..., -1:] * extension.seen).sum(1)
        return self._features(extension.hidden @ self.hidden + self.constant + mixed)

    def _features(self, sketches: Float[Tensor, "rows directions"]) -> Float[Tensor, "rows features"]:
        """Log-shares in the bands and in all the rest, at the attention's output map, then at the MLP."""
        most, lengths = self.edges[-1], constants().sketch_lengths
        sizes = (most, lengths, lengths, most, lengths)
        deviation = (sketches.split(sizes, 1)[2].square().sum(1) / self.adapter.hidden_size).sqrt()
        weak, length = (sketches / deviation[:, None] + self.bias).split(sizes, 1)[:2]
        attended, attended_length = sketches.split(sizes, 1)[3:]
        return torch.cat([self._shares(attended, attended_length), self._shares(weak, length)], 1)

    def _shares(self, weak: Tensor, length: Tensor) -> Tensor:
        squares, size = weak.square(), length.square().sum(1)
        rest = (size - squares.sum(1)).clamp(min=0.01 * size)  # lengths are estimated, and may fall short of a part
        whole = torch.cat([squares, rest[:, None]], 1)
        return log_shares(whole, (*self.edges, self.edges[-1] + 1), size)


def _random(width: int, like: Tensor, generator: torch.Generator) -> Float[Tensor, "width directions"]:
    """Random directions whose squared coefficients add up to the squared length, on average."""
    count = constants().sketch_lengths
    return torch.randn(width, count, generator=generator).to(like) / math.sqrt(count)


def _output_map(adapter: DecoderAdapter, like: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention's output map makes of nothing, and of each of its inputs."""
    width, heads = adapter.hidden_size, adapter.num_heads * adapter.head_width
    zero = adapter.after_attention(0, like.new_zeros(1, width), like.new_zeros(1, heads))
    eye = torch.eye(heads, device=like.device, dtype=like.dtype)
    return zero[0], adapter.after_attention(0, like.new_zeros(heads, width), eye) - zero


def _norm(adapter: DecoderAdapter, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Gain and bias of the norm before block 0's MLP, and whether it takes off the mean: three vectors tell."""
    signs = 1.0 - 2.0 * (torch.arange(adapter.hidden_size, device=like.device) % 2)
    ones = torch.ones_like(signs)
    bias, alternating, constant = adapter.mlp_input(0, torch.stack([0 * signs, signs, ones]).to(like))
    return (alternating - bias) * signs, bias, bool((constant - bias).norm() < 0.5 * (alternating - bias).norm())
