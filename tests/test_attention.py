"""Attention against torch's own, on random shapes, and its parts against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dager_tutorial.models import attention

WIDTH, SCALING = 5, 0.4
sizes = st.integers(1, 5)


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def torchs(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """The same by torch: one query, heads in front of positions, keys repeated for each head of their group."""
    groups = query.shape[-2] // keys.shape[-2]
    keys, values = (part.movedim(-2, -3).repeat_interleave(groups, -3) for part in (keys, values))
    shown = ~hidden[:, None, None, :]
    mixed = scaled_dot_product_attention(query[..., None, :], keys, values, attn_mask=shown, scale=SCALING)
    return mixed[..., 0, :].flatten(-2)


@settings(deadline=None)
@given(rows=sizes, length=sizes, key_heads=sizes, groups=sizes, seed=st.integers(0, 99), data=st.data())
def test_attention_is_torchs(
    rows: int, length: int, key_heads: int, groups: int, seed: int, data: st.DataObject
) -> None:
    keys_of = (rows, length, key_heads, WIDTH)
    query, keys, values = tensors(seed, (rows, key_heads * groups, WIDTH), keys_of, keys_of)
    seen = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    hidden = ~torch.tensor(data.draw(st.lists(seen, min_size=rows, max_size=rows)))
    found = attention.attend(query, keys, values, SCALING, hidden)
    torch.testing.assert_close(found, torchs(query, keys, values, hidden))
    everything = attention.attend(query, keys, values, SCALING)
    torch.testing.assert_close(everything, torchs(query, keys, values, torch.zeros_like(hidden)))


@settings(deadline=None)
@given(queries=sizes, length=sizes, key_heads=sizes, groups=sizes, seed=st.integers(0, 99))
def test_all_queries_share_the_keys_of_one_text(
    queries: int, length: int, key_heads: int, groups: int, seed: int
) -> None:
    """Keys without the queries' leading dimension are broadcast over it."""
    keys_of = (length, key_heads, WIDTH)
    query, keys, values = tensors(seed, (queries, key_heads * groups, WIDTH), keys_of, keys_of)
    found = attention.attend(query, keys, values, SCALING)
    one_by_one = [attention.attend(one, keys, values, SCALING) for one in query]
    torch.testing.assert_close(found, torch.stack(one_by_one))


@settings(deadline=None)
@given(rows=sizes, length=sizes, heads=sizes, seed=st.integers(0, 99), largest=st.sampled_from([1.0, 1e3]))
def test_join_is_attention_over_the_union(rows: int, length: int, heads: int, seed: int, largest: float) -> None:
    """Scores may be far beyond what an exponential holds, in float64 beyond 700."""
    query, keys, values = tensors(seed, (rows, heads, WIDTH), *[(rows, length + 1, heads, WIDTH)] * 2)
    query = query * largest
    scores = attention.scores(query, keys, SCALING)
    mixed = attention.mix(attention.weights(scores[..., :-1]), values[:, :-1]).unflatten(-1, (heads, WIDTH))
    joined = attention.join(mixed, scores[..., :-1].logsumexp(-1), scores[..., -1], values[:, -1])
    torch.testing.assert_close(joined.flatten(-2), attention.attend(query, keys, values, SCALING))


@given(
    length=st.integers(1, 9),
    starts=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 9)),
)
def test_unseen_keys_are_those_of_pads_and_beyond_the_window(
    length: int, starts: list[int], window: int | None
) -> None:
    found = attention.unseen(length, torch.tensor(starts), window)
    assert found.shape == (len(starts), length)
    for row, start in enumerate(starts):
        for key in range(length):
            distance = length - 1 - key
            seen = key >= start and (window is None or distance < window)
            assert bool(found[row, key]) == (not seen)


def test_shapes_are_checked() -> None:
    """Guards the check of annotations under pytest: weights of three positions cannot mix the values of four."""
    with pytest.raises(TypeCheckError):
        attention.mix(torch.ones(2, 3), torch.ones(4, 2, WIDTH))
