"""Ranks of real gradients against the formulas that predict them, and the cut between signal and noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import every, shaken
from hypothesis import given, settings
from hypothesis import strategies as st

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.rank import noise_edge, numerical_rank, right_singular, rounding_floor
from dager_tutorial.server.subspace import Span

Draw = Callable[..., list[str]]


def components(pairs: set[tuple[int, int]]) -> int:
    """Connected components of the graph of tokens and positions, by repeated merging."""
    groups: list[set[tuple[str, int]]] = []
    for token, place in pairs:
        touching = [group for group in groups if {("token", token), ("place", place)} & group]
        groups = [group for group in groups if group not in touching]
        groups.append({("token", token), ("place", place)}.union(*touching))
    return len(groups)


def predicted_rank(model: LanguageModel, texts: list[str]) -> int:
    """Rank of block 0's gradient."""
    source = adapter_for(model.network).first_input
    ids = encode(model.tokenizer, texts)
    pairs = {(token, place) for tokens in ids for place, token in enumerate(tokens)}
    tokens, places = {token for token, _ in pairs}, {place for _, place in pairs}
    if source.positions is None:
        return len(tokens)
    rank = len(tokens) + len(places) - components(pairs)
    # The norm's bias adds one, but only where the graph has a cycle: a forest has no more rows than this rank.
    return rank + (source.bias is not None and bool(source.bias.any()) and len(pairs) > rank)


def distinct_rows(model: LanguageModel, texts: list[str]) -> int:
    """Rank of block 1's gradient: distinct prefixes, or places in distinct sentences."""
    causal = adapter_for(model.network).causal
    ids = encode(model.tokenizer, texts)
    return len({tuple(tokens[: i + 1]) if causal else (*tokens, -i - 1) for tokens in ids for i in range(len(tokens))})


def spans(model: LanguageModel, texts: list[str], dtype: str = "float32") -> tuple[Span, Span]:
    """Of blocks 0 and 1."""
    evidence = evidence_of(model, client_update(model, texts, config=ClientConfig(dtype=dtype)))
    first, second = (evidence.span(evidence.adapter.tap(block, QKV)) for block in (0, 1))
    assert first is not None and second is not None
    return first, second


@every("tiny_gpt2", "tiny_llama", "tiny_llama_bos", "tiny_bert", "qwen2@128", "smollm3@128")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_rank_is_the_predicted_one(model: LanguageModel, dtype: str, random_texts: Draw) -> None:
    for size, seed in [(1, 1), (2, 2), (3, 3), (4, 4)]:
        texts = random_texts(size, seed)
        first, second = spans(model, texts, dtype=dtype)
        assert (first.rank, second.rank) == (predicted_rank(model, texts), distinct_rows(model, texts))
        assert first.clear and not first.saturated and first.gap > 100


@every("tiny_bert", "tiny_gpt2")
@pytest.mark.parametrize("texts, grows", [(["dog the", "the dog", "cat is"], True), (["dog the cat", "cat is"], False)])
def test_a_bias_adds_one_to_the_rank_where_the_graph_has_a_cycle(
    model: LanguageModel, texts: list[str], grows: bool
) -> None:
    trained = shaken(model)
    before, after = spans(model, texts)[0].rank, spans(trained, texts)[0].rank
    assert (before, after) == (predicted_rank(model, texts), predicted_rank(trained, texts))
    assert after == before + grows


def test_many_components_and_repeats_in_the_bipartite_formula(tiny_gpt2: LanguageModel) -> None:
    for texts in (["a and any"], ["cat cat cat", "cat dog"], ["cat", "dog", "cat"]):
        assert spans(tiny_gpt2, texts)[0].rank == predicted_rank(tiny_gpt2, texts)


@pytest.mark.parametrize("outputs, inputs", [(200, 60), (60, 60), (30, 60), (40, 200)])
@pytest.mark.parametrize("rank", [0, 1, 7, 20])
@pytest.mark.parametrize("sigma", [1e-12, 1e-7, 1e-4, 1e-2])
def test_numerical_rank_of_low_rank_plus_noise(outputs: int, inputs: int, rank: int, sigma: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.linalg.qr(torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)).Q[:, :rank]
    right = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q[:, :rank]
    size = sigma * (math.sqrt(outputs) + math.sqrt(inputs))
    strengths = 3 * size * 3.0 ** torch.arange(rank, dtype=torch.float64)
    noisy = left * strengths @ right.T
    noisy += sigma * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(noisy)
    values = torch.cat([values, values.new_zeros(inputs - len(values))])
    # The largest value of noise itself passes the edge now and then, by chance, and costs one direction of many.
    assert rank <= numerical_rank(values, outputs, 0.0) <= rank + 1


@pytest.mark.parametrize("outputs, inputs", [(300, 100), (100, 300), (150, 150)])
def test_the_edge_is_the_largest_singular_value_of_noise(outputs: int, inputs: int) -> None:
    """Of noise that the edge itself is told only the energy of."""
    noise = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).double()
    values = right_singular(noise)[0]
    energy = values.square().sum().item()
    assert noise_edge(energy, outputs, inputs, 0.0) == pytest.approx(values[0].item(), rel=0.05)
    assert noise_edge(energy, outputs, inputs, 1e9) == 1e9
    assert noise_edge(0.0, 0, inputs, 0.5) == noise_edge(0.0, outputs, 0, 0.5) == 0.5  # nothing is left to be noise


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 30), inputs=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_directions_are_orthonormal_and_give_the_gradient_back(outputs: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    values, directions = right_singular(gradient)
    torch.testing.assert_close(directions.T @ directions, torch.eye(inputs, dtype=torch.float64))
    torch.testing.assert_close((gradient @ directions).norm(dim=0), values)
    assert (values[:-1] >= values[1:]).all()


def test_noise_whose_own_spectrum_falls_steeply_is_no_signal() -> None:
    """Rounding noise may fall over many orders of magnitude itself: its values pass each other's edges, not the gap.

    Seen in the attention output of a random BERT, B = 1: the noise begins 29 times above the rounding floor.
    """
    floor = 5e-8
    signal = torch.logspace(0, -1.7, 36, dtype=torch.float64)
    noise = torch.logspace(math.log10(29 * floor), -12, 732, dtype=torch.float64)
    assert numerical_rank(torch.cat([signal, noise]), 768, floor) == 36


def test_a_weak_signal_above_a_clear_gap_counts() -> None:
    """A direction far below the others and far above the noise, as the bias of a layer norm may be, is signal.

    Seen in block 0 of MiniLM, B = 4: 2e-2, then 6e-5, then rounding of 6e-7.
    """
    floor = 6.5e-8
    signal = torch.cat([torch.logspace(1, -1.6, 47, dtype=torch.float64), torch.tensor([6.4e-5], dtype=torch.float64)])
    noise = torch.logspace(math.log10(6.4e-7), math.log10(2e-7), 336, dtype=torch.float64)
    assert numerical_rank(torch.cat([signal, noise]), 1152, floor) == 48


def test_numerical_rank_of_extremes() -> None:
    full = torch.logspace(0, -3, 20, dtype=torch.float64)
    assert numerical_rank(full, 400, 1e-9) >= 19  # a last value alone cannot be told from noise
    assert numerical_rank(torch.zeros(20, dtype=torch.float64), 400, 1e-9) == 0
    assert numerical_rank(torch.zeros(20, dtype=torch.float64), 400, 0.0) == 0
    one = torch.cat([torch.ones(1, dtype=torch.float64), torch.zeros(19, dtype=torch.float64)])
    assert numerical_rank(one, 1, 1e-9) <= 1  # a single row may be noise as well
    assert numerical_rank(one, 400, 1e-9) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_lies_below_what_storing_a_gradient_does_to_it(dtype: torch.dtype) -> None:
    """And not far below: within a factor of two of the largest singular value of the errors."""
    exact = torch.randn(120, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = torch.linalg.matrix_norm(exact.to(dtype).double() - exact, 2).item()
    floor = rounding_floor(exact, torch.finfo(dtype).eps)
    assert errors / 2 < floor < 1.05 * errors
