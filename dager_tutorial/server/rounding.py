"""How precisely the server can know the vectors that a client computed (chapter `04_noise`).

Client and server run the same network, but not the same kernels in the same order: their hidden states differ by
rounding, little in float32 and much in bfloat16. A span test has to allow for it. It is measured, not assumed: a few
random tokens are run block by block in the client's precision, in the server's, and in float64.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dager_tutorial.models.adapter import Adapter, DecoderAdapter, EncoderAdapter
from dager_tutorial.models.attention import attend, unseen
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap, has_float64
from dager_tutorial.server.constants import constants


class Replayed(NamedTuple):
    """What one block did with a few texts.

    Attributes:
        inputs: For each kind of tap the vectors that entered it, texts x length x inputs.
        hidden: What the next block gets, texts x length x width.
    """

    inputs: dict[str, Tensor]
    hidden: Tensor


def rounding_errors(adapter: Adapter, dtype: torch.dtype, blocks: int, seed: int = 0) -> dict[Tap, float]:
    """Relative error of every tap's input: client in `dtype`, server in float32, both against float64.

    Args:
        adapter: The architecture, in float32.
        dtype: The client's precision.
        blocks: How many blocks to measure, from block 0.
        seed: Seed of the probe's tokens.

    Returns:
        For each tap of these blocks the root mean square of difference over vector.
    """
    tokens = probe(adapter, constants().probe_texts, constants().probe_length, seed)
    kinds = dict.fromkeys((torch.float64, torch.float32, dtype))
    inputs = {kind: _inputs(adapter, kind, tokens, blocks) for kind in kinds}
    exact, server, client = (inputs[kind] for kind in (torch.float64, torch.float32, dtype))
    return {tap: math.hypot(_relative(server[tap], x), _relative(client[tap], x)) for tap, x in exact.items()}


def probe(adapter: Adapter, texts: int, length: int, seed: int) -> Int[Tensor, "texts length"]:
    """Random token ids (int64), the same on every device.

    Args:
        adapter: The architecture, which has the vocabulary.
        texts: How many texts.
        length: Tokens of each.
        seed: Seed of the draw.
    """
    table = adapter.first_input.tokens
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(len(table), (length, texts), generator=draw).T.to(table.device)


def _relative(vectors: Tensor, exact: Tensor) -> float:
    difference = (vectors.to(exact) - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-300)
    return difference.square().mean().sqrt().item()


def _inputs(adapter: Adapter, dtype: torch.dtype, tokens: Tensor, blocks: int) -> dict[Tap, Tensor]:
    """Inputs of every tap of the first blocks, computed in one precision."""
    exact = dtype == torch.float64 and not has_float64(tokens.device)
    place = torch.device("cpu") if exact else tokens.device
    hidden = _entering(adapter, tokens, dtype, place)
    found: dict[Tap, Tensor] = {}
    for block in range(blocks):
        replayed = replay(_converted(adapter, block, dtype, place), block, hidden)
        hidden = replayed.hidden
        found |= {adapter.tap(block, kind): vectors for kind, vectors in replayed.inputs.items()}
    return found


def _entering(adapter: Adapter, tokens: Tensor, dtype: torch.dtype, place: torch.device) -> Tensor:
    """What enters block 0 (texts x length x width)."""
    if isinstance(adapter, DecoderAdapter):
        states = [adapter.embed(column, position) for position, column in enumerate(tokens.T)]
        return torch.stack(states, 1).to(place, dtype)
    # An encoder's norm stands before block 0: its vectors are computed in the precision, too.
    source = adapter.first_input
    rows = source.tokens[tokens.flatten()]
    if source.positions is not None:
        rows = rows + source.positions[: tokens.shape[1]].repeat(len(tokens), 1)
    few = replace(
        source,
        tokens=rows.to(place, dtype),
        positions=None,
        gain=source.gain.to(place, dtype),
        bias=None if source.bias is None else source.bias.to(place, dtype),
    )
    return few.vectors(torch.arange(len(rows), device=place), None).unflatten(0, tuple(tokens.shape))


def _converted(adapter: Adapter, block: int, dtype: torch.dtype, place: torch.device) -> Adapter:
    """The same adapter over a network that shares everything but one block, which is copied into `dtype`."""
    if dtype == torch.float32:
        return adapter
    parts = list(adapter.blocks)
    # A memo: these take the place of copies of the originals, which would only be made to be converted.
    converted: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(place, dtype), requires_grad=False)
        for parameter in parts[block].parameters()
    }
    parts[block] = copy.deepcopy(parts[block], converted).to(place, dtype)
    return type(adapter)(_with_blocks(adapter.network, adapter.blocks, nn.ModuleList(parts), place))


def _with_blocks(module: nn.Module, blocks: nn.Module, swapped: nn.Module, place: torch.device) -> Any:
    """A module in which one list of blocks, at any depth, is another one; all weights beside it are shared."""
    if module is blocks:
        return swapped
    if next(module.parameters(), None) is None:  # rotary tables, for one: they belong beside the block
        return copy.deepcopy(module).to(place)
    if all(child is not blocks for child in module.modules()):
        return module
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else _with_blocks(child, blocks, swapped, place)
        for name, child in module._modules.items()
    }
    return twin


@torch.no_grad()
def replay(adapter: Adapter, block: int, hidden: Float[Tensor, "texts length width"]) -> Replayed:
    """Run one block piece by piece on whole texts without pads, in the precision of the block.

    Args:
        adapter: The architecture.
        block: Index of the block.
        hidden: What enters the block: before its norm for a decoder, behind it for an encoder.
    """
    if isinstance(adapter, DecoderAdapter):
        return _replay_decoder(adapter, block, hidden)
    assert isinstance(adapter, EncoderAdapter)
    query, keys, values = adapter.project(block, hidden)
    attended = attend(query, keys[:, None], values[:, None], adapter.scaling(block))
    inner = adapter.after_attention(block, hidden, attended)
    return Replayed({QKV: hidden, ATTENTION_OUTPUT: attended, MLP: inner}, adapter.after_mlp(block, inner))


def _replay_decoder(adapter: DecoderAdapter, block: int, hidden: Tensor) -> Replayed:
    """All positions at once but for what depends on the place: rotations, and which keys a query sees."""
    rows = hidden.flatten(0, 1)
    vectors = adapter.attention_input(block, rows)
    by_position = zip(
        *(part.unflatten(0, hidden.shape[:2]).unbind(1) for part in adapter.query_key_value(block, vectors)),
        strict=True,
    )
    parts = [adapter.placed(block, each, position) for position, each in enumerate(by_position)]
    query, keys, values = (torch.stack(part, 1) for part in zip(*parts, strict=True))
    starts = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    attended = []
    for position in range(hidden.shape[1]):
        seen, hide = slice(position + 1), unseen(position + 1, starts, adapter.window(block))
        attended.append(attend(query[:, position], keys[:, seen], values[:, seen], adapter.scaling(block), hide))
    mixed = torch.stack(attended, 1).flatten(0, 1)
    state = adapter.after_attention(block, rows, mixed)
    inner = adapter.mlp_input(block, state)
    taps = {QKV: vectors, ATTENTION_OUTPUT: mixed, MLP: inner}
    shaped = {kind: each.unflatten(0, hidden.shape[:2]) for kind, each in taps.items()}
    return Replayed(shaped, adapter.after_mlp(block, state, inner).unflatten(0, hidden.shape[:2]))
