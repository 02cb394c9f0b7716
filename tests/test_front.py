"""Block 0 for pairs of a prefix and a candidate, three ways, against the whole network."""

from __future__ import annotations

import pytest
import torch
from helpers import every
from torch import Tensor

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.decoder.front import Extension, FirstBlock, Front

LENGTH = 6  # beyond the window of the tiny Mistral
MODELS = ("shaken_gpt2", "llama", "mistral", "qwen2", "smollm3", "smollm3-nope")


def block_0(model: LanguageModel, memory: int = 2**29) -> FirstBlock:
    adapter = adapter_for(model.network)
    assert isinstance(adapter, DecoderAdapter)
    inputs = adapter.num_heads * adapter.head_width
    directions = torch.randn(inputs, 10, generator=torch.Generator().manual_seed(0))
    return FirstBlock.screened(adapter, directions, Budget(memory=memory))


def every_pair(block: FirstBlock, front: Front, extension: Extension) -> Tensor:
    """All pairs of a prefix and a candidate; where there is no prefix yet, the beginnings."""
    if not front.nodes:
        return block.beginnings(extension)
    return torch.cartesian_prod(torch.arange(len(front.nodes)), torch.arange(len(extension.tokens)))


def some_prefixes(block: FirstBlock) -> tuple[Front, list[tuple[int, tuple[int, ...]]]]:
    """A front of random prefixes with what they are: start and tokens; with absolute positions some begin late."""
    draw = torch.Generator().manual_seed(1)
    front = block.empty()
    known: list[tuple[int, tuple[int, ...]]] = []
    for position in range(LENGTH):
        extension = block.extension(position, torch.randint(500, (7,), generator=draw))
        pairs = every_pair(block, front, extension)
        if front.nodes:
            pairs = torch.cat([pairs, block.beginnings(extension)])
        pairs = pairs[torch.randperm(len(pairs), generator=draw)[:6]]
        front = block.grown(front, extension, pairs, list(range(len(pairs))))
        known = [
            (position, (token,)) if place < 0 else (known[place][0], (*known[place][1], token))
            for place, token in zip(pairs[:, 0].tolist(), extension.tokens[pairs[:, 1]].tolist(), strict=True)
        ]
    return front, known


def by_the_network(block: FirstBlock, known: list[tuple[int, tuple[int, ...]]], tokens: Tensor) -> Tensor:
    """Prefixes x candidates x inputs of the attention's output map, by whole forward passes."""
    adapter, tap = block.adapter, block.adapter.tap(0, ATTENTION_OUTPUT)
    rows = []
    for start, prefix in known:
        ids = torch.tensor([[*prefix, token] for token in tokens.tolist()])
        starts = torch.full((len(ids),), start)
        rows.append(adapter.tap_inputs(ids, torch.ones_like(ids), [tap], starts=starts)[tap][:, -1])
    return torch.stack(rows)


def by_pairs(block: FirstBlock, front: Front, extension: Extension, pairs: Tensor) -> Tensor:
    parts = list(block.of_pairs(front, extension, pairs))
    indices = torch.cat([part for part, _ in parts])
    assert sorted(indices.tolist()) == list(range(len(pairs)))
    return torch.cat([attended for _, attended in parts])[indices.argsort()]


@every(*MODELS)
@pytest.mark.parametrize("memory", [1, 20_000, 2**29])
def test_three_ways_are_one_and_the_networks(model: LanguageModel, memory: int) -> None:
    block = block_0(model, memory)
    front, known = some_prefixes(block)
    assert block.rotary or len({start for start, _ in known}) > 1
    extension = block.extension(LENGTH, torch.tensor([5, 77, 5, 301, 12]))
    wanted = by_the_network(block, known, extension.tokens)
    chunks = list(block.chunks(front, extension))
    assert torch.equal(torch.cat(chunks), torch.arange(len(known)))
    whole = torch.cat([block.of_all(front, extension, places) for places in chunks])
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    everyone = every_pair(block, front, extension)
    torch.testing.assert_close(by_pairs(block, front, extension, everyone), wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)
    few = everyone[[0, 1, 2, 3, 4, 7, 16, 29]]  # one prefix is crowded, three are not
    torch.testing.assert_close(
        by_pairs(block, front, extension, few), wanted[few[:, 0], few[:, 1]], rtol=1e-4, atol=1e-5
    )
    screened = torch.cat([block.screen(front, extension, places) for places in chunks])
    inside = wanted @ block.directions.flatten(0, 1)
    torch.testing.assert_close(screened, inside.square().sum(2), rtol=1e-3, atol=1e-4)


@every(*MODELS)
def test_a_beginning_attends_to_itself(model: LanguageModel) -> None:
    """At position 0 everywhere; later only where positions are absolute, behind left padding."""
    block = block_0(model)
    for position in (0, 3):
        extension = block.extension(position, torch.tensor([5, 77, 301]))
        pairs = block.beginnings(extension)
        assert len(pairs) == (3 if position == 0 or not block.rotary else 0)
        if len(pairs):
            found = by_pairs(block, block.empty(), extension, pairs)
            wanted = by_the_network(block, [(position, ())], extension.tokens)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_taken_front_is_its_part(tiny_llama: LanguageModel) -> None:
    block = block_0(tiny_llama)
    front, known = some_prefixes(block)
    few, places = front.take([4, 1]), torch.arange(2)
    extension = block.extension(LENGTH, torch.tensor([5, 77]))
    wanted = by_the_network(block, [known[4], known[1]], extension.tokens)
    assert few.nodes == [front.nodes[4], front.nodes[1]]
    torch.testing.assert_close(block.of_all(few, extension, places), wanted, rtol=1e-4, atol=1e-5)


@every("shaken_gpt2", "llama")
def test_nothing_is_computed_once_the_time_is_spent(model: LanguageModel) -> None:
    block = block_0(model)
    front, _ = some_prefixes(block)
    extension = block.extension(LENGTH, torch.tensor([5, 77]))
    late = FirstBlock(block.adapter, block.directions, Budget(deadline=0.0))
    pairs = every_pair(block, front, extension)
    assert not list(late.chunks(front, extension)) and not list(late.of_pairs(front, extension, pairs))
