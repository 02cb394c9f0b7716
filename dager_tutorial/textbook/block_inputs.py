"""What enters a block's attention, by running the unmodified network up to it and no further.

Chapters `05_token_filter` and `06_decoder_recovery`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.tap import QKV

TokenIds = tuple[int, ...]
"""A text, or the beginning of one."""

TOKENS_A_PASS = 4096
"""Tokens that go through the network at once."""


def first_block_inputs(
    adapter: Adapter, tokens: Int[Tensor, " tokens"], position: int
) -> Float[Tensor, "tokens width"]:
    """What enters the query, key and value maps of block 0, where nothing has been mixed yet.

    Args:
        adapter: The architecture.
        tokens: int64 token ids, each put at the position by itself.
        position: The position, from 0.

    Returns:
        float32.
    """
    return _run_to_block(adapter, 0, tokens[:, None], position)[:, 0]


def second_block_inputs(
    adapter: Adapter, token_ids: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length width"]:
    """What enters the query, key and value maps of block 1.

    Args:
        adapter: The architecture.
        token_ids: int64, without pads.

    Returns:
        float32.
    """
    return _run_to_block(adapter, 1, token_ids)


def is_rotary(adapter: Adapter) -> bool:
    """Whether block 0's attention input is the same at all positions."""
    return adapter.first_input.positions is None


def batches(texts: Iterable[TokenIds], length: int) -> Iterator[list[TokenIds]]:
    """Lists of as many texts as go through the network at once.

    Args:
        texts: Token ids of texts of one length.
        length: The length.

    Example:
        >>> [len(batch) for batch in batches([(1,) * 1000] * 12, 1000)]
        [5, 5, 2]
    """
    texts = iter(texts)
    while batch := list(islice(texts, TOKENS_A_PASS // length + 1)):
        yield batch


class _Reached(Exception):
    """The way out of a forward pass: carries the vectors that enter a block's attention."""


def _run_to_block(
    adapter: Adapter, block: int, token_ids: Int[Tensor, "batch length"], start: int = 0
) -> Float[Tensor, "batch length width"]:
    """Run texts that begin at the position `start` up to the query, key and value maps of a block."""

    def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    positions = adapter.position_ids(torch.ones_like(token_ids[:1])) + start
    handle = adapter.linear_maps(block, QKV)[0].register_forward_pre_hook(stop)
    try:
        adapter.network(input_ids=token_ids, position_ids=positions, use_cache=False)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"a forward pass went by block {block}")
