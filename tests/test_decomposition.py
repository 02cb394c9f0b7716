"""The sketch of a signal against the full decomposition, on every kind of spectrum that it may meet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dager_tutorial.server.decomposition import Signal, decomposed, signal_of
from dager_tutorial.server.reading import span_of
from dager_tutorial.server.subspace import Span

FLOAT32 = 2.0**-23


def gradient(rows: int, *, outputs: int = 700, inputs: int = 320, spread: float = 2.0, seed: int = 0) -> Tensor:
    """A gradient of so many rows, float64, whose weights spread over so many decades."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
    vectors += 3 * torch.randn(1, inputs, generator=draw, dtype=torch.float64)  # what all rows share
    weights = torch.randn(outputs, rows, generator=draw, dtype=torch.float64)
    return (weights * 10 ** (-spread * torch.rand(rows, generator=draw, dtype=torch.float64))) @ vectors


def assert_alike(found: Signal, full: Signal) -> None:
    """The same signal, and noise as strong as the calibration needs to know it."""
    assert len(found.values) == len(full.values)
    torch.testing.assert_close(found.values, full.values, rtol=1e-9, atol=0)
    projected = full.directions - found.directions @ (found.directions.T @ full.directions)
    # A direction may be off by much less than noise turns it anyway.
    assert float((projected.norm(dim=0) * full.values).max()) < 0.01 * full.tail.largest
    assert found.tail.energy == pytest.approx(full.tail.energy, rel=0.15)
    assert found.tail.largest == pytest.approx(full.tail.largest, rel=0.35)
    # Of the fourth powers only the bound of the span test is made.
    bounds = [Span(each.directions, each.values, each.tail, 700).bound for each in (found, full)]
    assert bounds[0] == pytest.approx(bounds[1], rel=0.03)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 145), spread=st.floats(0, 2.5), seed=st.integers(0, 2**31))
def test_a_clean_signal_is_the_full_decompositions(rows: int, spread: float, seed: int) -> None:
    matrix = gradient(rows, spread=spread, seed=seed).float().double()
    found = signal_of(matrix, FLOAT32)
    assert_alike(found, decomposed(matrix, FLOAT32))
    assert len(found.values) == rows


@pytest.mark.parametrize("noise", [1e-6, 1e-4])
def test_under_gaussian_noise(noise: float) -> None:
    matrix = gradient(20, spread=0.5)
    size = noise * matrix.square().mean().sqrt()
    matrix += size * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_alike(signal_of(matrix, FLOAT32), decomposed(matrix, FLOAT32))


@pytest.mark.parametrize(
    ("matrix", "precision"),
    [
        (gradient(30).bfloat16().double(), 2.0**-8),
        (gradient(200).float().double(), FLOAT32),
        (gradient(310).float().double(), FLOAT32),
        (gradient(20), 2.0**-52),
        (torch.randn(700, 320, generator=torch.Generator().manual_seed(0)).double(), FLOAT32),
    ],
    ids=["no gap in bfloat16", "more than half of the width", "nearly full", "float64", "noise alone"],
)
def test_where_a_sketch_cannot_tell_everything_is_decomposed(matrix: Tensor, precision: float) -> None:
    found, full = signal_of(matrix, precision), decomposed(matrix, precision)
    assert len(found.values) == len(full.values)
    if found.complete is not None:
        assert full.complete is not None and torch.equal(found.complete.values, full.complete.values)
    assert found.complete is not None or len(full.values) == 0


def test_a_steep_signal_and_steep_noise() -> None:
    """Signal over five decades, then noise that falls over many decades itself: the gap between them is found."""
    draw = torch.Generator().manual_seed(2)
    left, right = (
        torch.linalg.qr(torch.randn(size, 320, generator=draw, dtype=torch.float64)).Q for size in (700, 320)
    )
    values = torch.cat([torch.logspace(0, -4, 25), torch.logspace(-6.2, -12, 295)]).double()
    matrix = left * values @ right.T
    found, full = signal_of(matrix, FLOAT32), decomposed(matrix, FLOAT32)
    assert len(found.values) == len(full.values) == 25


def test_one_direction_far_weaker_than_all_others_is_as_exact_as_they() -> None:
    """It comes last in a sketch that has grown twice, beside what is tens of thousands of times stronger."""
    draw = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(size, 320, generator=draw, dtype=torch.float64)).Q for size in (700, 320)
    )
    values = torch.cat([torch.logspace(1.1, -1.9, 114), torch.tensor([3e-4]), 1e-6 * torch.linspace(1, 0.1, 205)])
    matrix = left * values.double() @ right.T
    for guess in (0, 60):
        found, full = signal_of(matrix, FLOAT32, guess=guess), decomposed(matrix, FLOAT32)
        assert found.complete is None
        assert_alike(found, full)
        off = full.directions[:, -1] - found.directions @ (found.directions.T @ full.directions[:, -1])
        assert float(off.norm()) < 1e-4


def test_it_is_deterministic_and_a_guess_changes_nothing() -> None:
    matrix = gradient(40).float().double()
    first, again, guessed = (signal_of(matrix, FLOAT32, guess=guess) for guess in (0, 0, 90))
    assert torch.equal(first.directions, again.directions) and first.tail == again.tail
    assert_alike(guessed, first)


def both(matrix: Tensor) -> tuple[Span, Span]:
    """A span by its sketch, and from the full spectrum."""
    span = span_of(matrix, arithmetic=1e-7)
    assert span is not None and span.known is None
    return span, Span.cut(span.directions, span.singular_values, span.rank, span.outputs, span.arithmetic)


@pytest.mark.parametrize("rows", [5, 45, 100])
def test_both_spans_say_the_same_of_every_vector(rows: int) -> None:
    matrix = gradient(rows)
    sketched, full = both(matrix.float().double())
    draw = torch.Generator().manual_seed(3)
    true = (
        torch.linalg.qr(matrix.T).Q[:, :rows]
        * torch.randn(rows, generator=draw)
        @ torch.randn(rows, 400, generator=draw).double()
    )
    true = true.T.float()
    false = torch.randn(400, 320, generator=draw)
    near = true + 1e-3 * true.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(false, dim=1)
    assert bool(sketched.holds(true).all()) and bool(full.holds(true).all())
    for vectors in (false, near):
        torch.testing.assert_close(sketched.ratio(vectors), full.ratio(vectors), rtol=0.15, atol=0)
    assert sketched.bound == pytest.approx(full.bound, rel=0.01)
    assert sketched.worst == pytest.approx(full.worst, rel=0.1)
    assert math.isclose(sketched.noise_floor, full.noise_floor, rel_tol=0.1)


def test_directions_outside_are_orthonormal_and_outside() -> None:
    sketched, full = both(gradient(30).float().double())
    for span in (sketched, full):
        for count in (7, 10**6):
            outside = span.outside(count, torch.Generator().manual_seed(0))
            assert outside.shape == (320, min(count, 290))
            torch.testing.assert_close(outside.T @ outside, torch.eye(outside.shape[1], dtype=torch.float64))
            assert float((span.signal.T @ outside).abs().max()) < 1e-12
