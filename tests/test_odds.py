"""Log-odds: their ends, their order, the hard test that they contain, and what they are worth on simulated rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from dager_tutorial.server.constants import constants, varied
from dager_tutorial.server.odds import (
    Usual,
    chance_quantile,
    least_log_odds,
    leverage_log_odds,
    residual_log_odds,
    usual,
)
from dager_tutorial.server.reading import span_of
from dager_tutorial.server.subspace import Span

freedoms = st.floats(1, 5000)
random_ratios = st.floats(0, 12).map(lambda power: 10**power)
WIDTH = 96


def bound(freedom: float) -> float:
    return constants().model_error * math.sqrt(chi2.isf(constants().miss_rate, freedom) / freedom)


@settings(deadline=None)
@given(freedom=freedoms, random_ratio=random_ratios)
def test_residual_odds_fall_from_certain_to_the_floor(freedom: float, random_ratio: float) -> None:
    ratio = torch.cat([torch.tensor([0.0, 1e-30]), torch.logspace(-2, 30, 2000), torch.tensor([math.inf])])
    odds = residual_log_odds(ratio, freedom, random_ratio)
    assert odds.isfinite().all() and (odds.diff() <= 1e-12).all()
    # Where a random direction looks like a true row there is nothing to learn.
    assert odds[0] >= (1e-3 if random_ratio > 1.1 * constants().model_error else 0)
    assert odds[-1].item() == pytest.approx(math.log(constants().miss_rate))


@settings(deadline=None)
@given(freedom=freedoms, random_ratio=random_ratios, miss_rate=st.sampled_from([1e-9, 1e-6, 1e-3]))
def test_residual_odds_at_the_bound_are_the_least(freedom: float, random_ratio: float, miss_rate: float) -> None:
    with varied(miss_rate=miss_rate):
        at_bound = residual_log_odds(torch.tensor([bound(freedom)], dtype=torch.float64), freedom, random_ratio)
        # torch's incomplete gamma function has seven digits where neither tail is small
        tolerance = 1e-7 if miss_rate > 1e-6 else 1e-9
        assert at_bound.item() == pytest.approx(least_log_odds(random_ratio), abs=tolerance)


def test_a_likelihood_ratio_weighs_false_rows_no_more_than_true_ones() -> None:
    """What the ratio is worth under its own model of false rows: its mean is 1, as that of every likelihood ratio."""
    freedom, random_ratio, slack = 40.0, 1e5, math.log(constants().model_error)
    log_z = torch.linspace(-slack, max(math.log(random_ratio), slack), 200_001, dtype=torch.float64)
    assert residual_log_odds(log_z.exp(), freedom, random_ratio).exp().mean().item() == pytest.approx(1, abs=0.1)


def rows(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Span]:
    """Rows of unequal gradients, and the span of what a client of this precision sends."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(4 * WIDTH, count, generator=generator, dtype=torch.float64)
    weights *= 10 ** (-torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    span = span_of((weights @ inputs).to(dtype).double(), precision=torch.finfo(dtype).eps)
    assert span is not None
    return inputs.float(), span


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hard_test_is_the_case_of_the_least_odds(dtype: torch.dtype) -> None:
    """On 4000 vectors whose ratios surround the bound, many of them by the last bit of a float32 number."""
    inputs, span = rows(20, 1, dtype)
    outwards = torch.nn.functional.normalize(torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(2)))
    low, high = torch.zeros(4000, 1), torch.ones(4000, 1)
    for _ in range(40):  # bisect the step that leads each row out of the span
        middle = (low + high) / 2
        inside = (span.ratio(inputs[0] + middle * outwards) <= span.bound)[:, None]
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    for step in (low, high, 0.9 * low, 1.1 * high):
        vectors = inputs[0] + step * outwards
        assert torch.equal(span.holds(vectors), span.log_odds(vectors) >= span.least_log_odds)
    assert (
        span.holds(inputs[0] + 0.9 * low * outwards).all() and not span.holds(inputs[0] + 1.1 * high * outwards).any()
    )


def test_the_number_nearest_to_the_bound_is_on_one_side_of_it() -> None:
    """Rounded to float32, the bound itself may lie above the bound: the two tests must agree on it, too."""
    for count in range(10, 60):
        span = rows(count, count)[1]
        nearest = torch.tensor([span.bound], dtype=torch.float32)
        object.__setattr__(span, "ratio", lambda vectors, nearest=nearest: nearest)
        assert torch.equal(span.holds(torch.ones(1, WIDTH)), span.log_odds(torch.ones(1, WIDTH)) >= span.least_log_odds)


def test_odds_of_true_and_of_random_rows() -> None:
    """Positive for every true row; for a random direction the floor, and about as far out as the span says."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs, span = rows(20, 3, dtype)
        assert (span.log_odds(inputs) > 0).all()
        others = span.log_odds(torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(4)))
        assert others.tolist() == pytest.approx([math.log(constants().miss_rate)] * 500)


@settings(deadline=None)
@given(centre=st.floats(-50, 50), spread=st.floats(0, 20))
def test_leverage_odds_are_bounded_and_fall(centre: float, spread: float) -> None:
    values = torch.cat([torch.tensor([-1e30]), torch.linspace(-400, 400, 3000), torch.tensor([1e30])])
    odds = leverage_log_odds(values, Usual(centre, spread))
    assert odds.isfinite().all() and (odds.diff() <= 1e-9).all()
    most = math.log(2 / constants().miss_rate)
    assert odds[0].item() == pytest.approx(most, abs=1e-3) and odds[-1].item() == pytest.approx(-most, abs=1)


def area(true: Tensor, false: Tensor) -> float:
    """Share of pairs of a true and a false row that are in order."""
    return (true[:, None] > false).double().mean().item()


@pytest.mark.parametrize("count, separated", [(120, 0.995), (150, 0.98)])
def test_leverage_odds_on_simulated_rows(count: int, separated: float) -> None:
    """More rows than the model is wide, false ones drawn like true ones: the odds of several taps add up."""
    sums, single = [torch.zeros(()), torch.zeros(())], []
    for tap in range(6):
        inputs, span = rows(count, 100 + tap)
        assert span.saturated
        draw = torch.Generator().manual_seed(200 + tap)
        of_others = usual(span.log_leverage(torch.randn(400, WIDTH, generator=draw)))
        false = torch.randn(count, WIDTH, generator=draw)
        odds = [leverage_log_odds(span.log_leverage(vectors), of_others) for vectors in (inputs, false)]
        assert odds[0].mean() > 1 and odds[1].mean() < -1
        single.append(area(*odds))
        sums = [before + now for before, now in zip(sums, odds, strict=True)]
    assert area(*sums) > max(single) and area(*sums) > separated
    assert (sums[1] < 0).all()


def test_deviations_are_robust() -> None:
    sample = torch.randn(4001, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat([sample, torch.full((200,), -1e6)])
    found = usual(spoilt * 7 + 3).deviations(sample * 7 + 3)
    torch.testing.assert_close(found, sample, atol=0.15, rtol=0.1)
    assert usual(torch.ones(5)).deviations(torch.tensor([1.0, 2.0])).isfinite().all()


def test_the_quantile_is_the_normal_one() -> None:
    sample = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for rate in (0.5, 0.025, 1e-3):
        assert (sample > chance_quantile(rate)).double().mean().item() == pytest.approx(rate, rel=0.1)
