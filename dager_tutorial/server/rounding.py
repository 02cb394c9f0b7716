"""How precisely the server can know the vectors that a client computed.

Client and server run the same network, but not the same kernels in the same order: their hidden states differ by
rounding, little in float32 and much in bfloat16. A span test has to allow for it. It is measured, not assumed: a few
random tokens are run block by block in the client's precision, in the server's, and in float64.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.models.adapter import DecoderAdapter

PROBE_TEXTS, PROBE_LENGTH = 8, 4


def attend(
    adapter: DecoderAdapter,
    block: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention of one query per text over its keys, the causal window applied.

    Args:
        adapter: The architecture.
        block: Index of the block.
        query: rows x heads x width.
        keys: rows x length x key heads x width, the query's own key last.
        values: Like `keys`.
        starts: int64, rows: how many of the first keys are not part of the text; None for none.

    Returns:
        rows x (heads * width), the input of the attention's output map.
    """
    window = adapter.window(block)
    first = 0 if window is None else max(0, keys.shape[1] - window)
    groups = adapter.num_heads // adapter.num_key_heads
    query = query.unflatten(1, (adapter.num_key_heads, groups))
    scores = torch.einsum("rkgw,rlkw->rkgl", query, keys[:, first:]) * adapter.scaling(block)
    if starts is not None:
        hidden = torch.arange(first, keys.shape[1], device=keys.device) < starts[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return torch.einsum("rkgl,rlkw->rkgw", scores.softmax(-1), values[:, first:]).flatten(1)


def rounding_errors(adapter: DecoderAdapter, dtype: torch.dtype, blocks: int, seed: int = 0) -> dict[Tap, float]:
    """Relative error of every tap's input: client in `dtype`, server in float32, both against float64.

    Args:
        adapter: The architecture, in float32.
        dtype: The client's precision.
        blocks: How many blocks to measure, from block 0.
        seed: Seed of the probe's tokens.

    Returns:
        For each tap of these blocks the root mean square of |difference| / |vector|.
    """
    vocabulary = adapter.first_input.tokens.shape[0]
    tokens = torch.randint(vocabulary, (PROBE_LENGTH, PROBE_TEXTS), generator=torch.Generator().manual_seed(seed))
    device = adapter.first_input.tokens.device
    start = [adapter.embed(row.to(device), position) for position, row in enumerate(tokens)]
    types = list(dict.fromkeys([torch.float64, torch.float32, dtype]))
    hidden = {kind: [state.to(kind) for state in start] for kind in types}
    errors: dict[Tap, float] = {}
    for block in range(blocks):
        inputs = {}
        for kind in types:
            part = adapter if kind == torch.float32 else _converted(adapter, block, kind)
            inputs[kind], hidden[kind] = _run_block(part, block, hidden[kind])
        for name, exact in inputs[torch.float64].items():
            parts = [_relative(inputs[kind][name], exact) for kind in (torch.float32, dtype)]
            errors[adapter.tap(block, name)] = math.hypot(*parts)
    return errors


def _relative(vectors: Tensor, exact: Tensor) -> float:
    difference = (vectors.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-300)
    return difference.square().mean().sqrt().item()


def _converted(adapter: DecoderAdapter, block: int, dtype: torch.dtype) -> DecoderAdapter:
    """The same adapter over a network that shares everything but one block, which is copied into `dtype`."""
    network = copy.copy(adapter.network)
    network._modules = dict(network._modules)
    name = next(name for name, module in network._modules.items() if module is adapter.blocks)
    parts = list(adapter.blocks)
    parts[block] = copy.deepcopy(parts[block]).to(dtype)
    network._modules[name] = nn.ModuleList(parts)
    return type(adapter)(network)


@torch.no_grad()
def _run_block(adapter: DecoderAdapter, block: int, hidden: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs of the block's taps (positions * texts x inputs) and the hidden states after it, position by position."""
    normed, attended, entering, leaving = [], [], [], []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for position, state in enumerate(hidden):
        vectors = adapter.attention_input(block, state)
        query, key, value = adapter.project(block, vectors, position)
        keys.append(key)
        values.append(value)
        mixed = attend(adapter, block, query, torch.stack(keys, 1), torch.stack(values, 1))
        state = adapter.after_attention(block, state, mixed)
        inner = adapter.mlp_input(block, state)
        normed.append(vectors)
        attended.append(mixed)
        entering.append(inner)
        leaving.append(adapter.after_mlp(block, state, inner))
    taps = {QKV: torch.cat(normed), ATTENTION_OUTPUT: torch.cat(attended), MLP: torch.cat(entering)}
    return taps, leaving
