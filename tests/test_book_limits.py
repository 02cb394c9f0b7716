"""The leverage law of chapter `11_limits`: what of it is exact, and what a simulation of strangers gives.

With `n` rows in `d` dimensions a row's leverage is to a stranger's as `n - d` to `n`. The theorem (G's rows orthogonal)
is algebra and holds to rounding. That strangers *drawn like the rows* follow it is statistics: for Gaussian rows their
mean leverage is known exactly (the mean of an inverse Wishart matrix), for any rows it has a lower bound.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

WIDTH = 50
ROUNDING = 1e-9  # float64, condition numbers below 1e5
BATCHES = 60
ERRORS = 4.0  # standard errors: beyond them lies one normal variable in 16 000


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leverages(gradient: Tensor, vectors: Tensor) -> Tensor:
    """`x (M^T M)^-1 x^T` for each row x of `vectors`; M is `gradient` (outputs x inputs)."""
    return (vectors * torch.linalg.solve(gradient.T @ gradient, vectors.T).T).sum(dim=1)


def orthogonal_rows(generator: torch.Generator, rows: int, outputs: int) -> Tensor:
    """Rows that are orthogonal and of very different lengths: gradients of texts that the loss hardly notices, too."""
    directions = torch.linalg.qr(normal(generator, outputs, rows)).Q.T
    return directions * torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("rows", [51, 60, 90, 150, 300])
def test_with_orthogonal_gradient_rows_the_law_is_exact(rows):
    draw = torch.Generator().manual_seed(rows)
    inputs = normal(draw, rows, WIDTH) * torch.logspace(0, -1, WIDTH, dtype=torch.float64)  # no special distribution
    outer = orthogonal_rows(draw, rows, 400)
    inside = leverages(outer.T @ inputs, inputs)
    held = outer.square().sum(1) * inside
    assert ((held > 0) & (held < 1 + ROUNDING)).all()
    assert abs(held.sum() - WIDTH) < ROUNDING * rows
    factors = 1 / (1 - held)
    assert float(1 / (1 / factors).mean()) == pytest.approx(rows / (rows - WIDTH), rel=1e-6)


@pytest.mark.parametrize("rows", [60, 90, 150])
def test_a_row_that_is_taken_out_has_the_factor_more_leverage(rows):
    draw = torch.Generator().manual_seed(rows)
    inputs, outer = normal(draw, rows, WIDTH), orthogonal_rows(draw, rows, 400)
    inside = leverages(outer.T @ inputs, inputs)
    factors = 1 / (1 - outer.square().sum(1) * inside)
    for row in (0, rows // 2, rows - 1):
        others = [index for index in range(rows) if index != row]
        outside = leverages(outer[others].T @ inputs[others], inputs[[row]])
        torch.testing.assert_close(outside, inside[[row]] * factors[row], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [60, 90, 150, 300])
@pytest.mark.parametrize("outputs", [150, 600])
def test_strangers_of_a_simulation_follow_the_law(rows, outputs):
    """Any outputs above d will do: with 150 of them 300 gradient rows are far from independent."""
    means = []
    for seed in range(BATCHES):
        draw = torch.Generator().manual_seed(seed)
        inputs, strangers = normal(draw, rows, WIDTH), normal(draw, 400, WIDTH)
        gradient = normal(draw, rows, outputs).T @ inputs
        means.append([float(leverages(gradient, part).mean()) for part in (strangers, inputs)])
    found = torch.tensor(means, dtype=torch.float64)
    outside, inside = found.mean(0)
    exact = rows / (rows - WIDTH - 1)
    # The error of a ratio of two means, to first order: that of `outside - exact * inside`.
    error = float((found[:, 0] - exact * found[:, 1]).std() / BATCHES**0.5 / inside)
    assert abs(float(outside / inside) - exact) < ERRORS * error
    assert error < 0.05 * exact  # or the test would say little
    assert rows / (rows + 1 - WIDTH) < rows / (rows - WIDTH) < exact  # the bound for any rows, the law, Gaussian rows


@pytest.mark.parametrize("rows, law", [(60, 6.0), (90, 2.25), (150, 1.5)])
def test_the_factors_that_the_chapter_prints(rows, law):
    assert rows / (rows - WIDTH) == law
