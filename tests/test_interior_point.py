"""The relaxation on problems whose answer is known by construction."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.encoder.interior_point import relax


class Problem(NamedTuple):
    """The arguments of `relax`."""

    attention: Tensor
    outside: Tensor
    slots: Tensor
    optional: Tensor


def problem(
    seed: int, *, slots: int = 6, each: int = 8, empty: int = 0, directions: int = 40
) -> tuple[Problem, list[int]]:
    """Attention of three queries over a hidden choice: what it gives lies in the span by construction.

    Returns:
        The problem and the chosen candidates. The first slot is settled; the last `empty` are empty.
    """
    draw = torch.Generator().manual_seed(seed)
    queries, heads, width = 3, 2, 20
    count = 1 + (slots - 1) * each
    numbers = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, slots).repeat_interleave(each)])
    values = torch.randn(heads, count, width, generator=draw, dtype=torch.float64)
    attention = (0.7 * torch.randn(queries, heads, count, generator=draw, dtype=torch.float64)).exp()
    chosen = [0] + [1 + slot * each + int(torch.randint(each, (), generator=draw)) for slot in range(slots - 1 - empty)]
    shares = attention[:, :, chosen] / attention[:, :, chosen].sum(2, keepdim=True)
    outputs = torch.einsum("qhc,hcw->qhw", shares, values[:, chosen]).flatten(1)
    free = torch.linalg.svd(outputs).Vh[len(outputs) :].T[:, :directions]
    outside = torch.einsum("hcw,hwd->hcd", values, free.unflatten(0, (heads, width)))
    optional = torch.arange(slots) >= slots - max(empty, 1)
    return Problem(attention, outside, numbers, optional), chosen


@pytest.mark.parametrize("measured", [None, 30])
@pytest.mark.parametrize("seed", range(5))
def test_the_hidden_choice_is_found(seed: int, measured: int | None) -> None:
    """One candidate of each slot gets all the weight, with every query measured in all directions or each in some."""
    posed, chosen = problem(seed)
    found = relax(*posed, measured)
    expected = torch.zeros_like(found.weights)
    expected[chosen] = 1
    assert torch.allclose(found.weights, expected, atol=0.02)
    assert found.residual < 1e-3


def test_it_is_the_best_of_all_choices() -> None:
    """The oracle tries every choice: only the one that the weights name leaves nothing outside."""
    posed, chosen = problem(11, slots=5, each=4)
    attention, outside, slots, _ = posed

    def left(choice: tuple[int, ...]) -> float:
        picked = list(choice)
        shares = attention[:, :, picked] / attention[:, :, picked].sum(2, keepdim=True)
        return float(torch.einsum("qhc,hcd->qd", shares, outside[:, picked]).norm())

    options = [(slots == slot).nonzero()[:, 0].tolist() for slot in range(5)]
    residuals = {choice: left(choice) for choice in itertools.product(*options)}
    best = min(residuals, key=lambda choice: residuals[choice])
    assert list(best) == chosen
    assert sorted(residuals.values())[1] > 1e6 * residuals[best]
    weights = relax(*posed).weights
    assert weights.argsort(descending=True)[:5].sort().values.tolist() == chosen


def test_the_weights_of_a_slot_add_up_to_one() -> None:
    """What is no slot's only candidate and no slack is between 0 and 1, and every slot that must be filled is."""
    posed, _ = problem(2, slots=8, empty=2)
    weights = relax(*posed).weights
    sums = torch.zeros(8, dtype=torch.float64).index_add(0, posed.slots, weights)
    assert float(weights.min()) >= 0
    assert torch.allclose(sums[~posed.optional], torch.ones(6, dtype=torch.float64), atol=1e-3)
    assert float(sums[posed.optional].max()) < 1 + 1e-3


def test_empty_slots_stay_empty() -> None:
    """A text may be shorter than the longest: its last slots get no weight."""
    posed, chosen = problem(3, slots=8, empty=3)
    weights = relax(*posed).weights
    assert float(weights[posed.slots >= 5].max()) < 0.02
    assert float(weights[chosen].min()) > 0.98


def test_order_and_scale_do_not_matter() -> None:
    """Permuted candidates have permuted weights; a factor on a query's attention in one head changes nothing."""
    posed, _ = problem(4)
    plain = relax(*posed).weights
    order = torch.randperm(len(posed.slots), generator=torch.Generator().manual_seed(1))
    shuffled = Problem(posed.attention[:, :, order], posed.outside[:, order], posed.slots[order], posed.optional)
    assert torch.allclose(relax(*shuffled).weights, plain[order], atol=1e-3)
    factor = torch.tensor([[2.0, 3.0], [0.1, 1.0], [7.0, 0.3]], dtype=torch.float64)[..., None]
    assert torch.allclose(relax(*posed._replace(attention=posed.attention * factor)).weights, plain, atol=1e-3)


def test_where_the_truth_is_no_candidate_the_residual_says_so() -> None:
    """Without the true candidate of one slot no weights make the equations vanish."""
    (attention, outside, slots, optional), chosen = problem(5)
    keep = torch.arange(len(slots)) != chosen[2]
    assert relax(attention[:, :, keep], outside[:, keep], slots[keep], optional).residual > 0.01


def test_nothing_to_choose() -> None:
    """Slots of one candidate each are settled."""
    posed, _ = problem(6, slots=3, each=1)
    assert relax(*posed._replace(optional=torch.zeros(3, dtype=torch.bool))).weights.tolist() == [1.0, 1.0, 1.0]


def test_without_time_the_weights_are_those_of_the_start() -> None:
    """Past the deadline no step is taken: all candidates of a slot weigh the same, and the residual says so."""
    posed, _ = problem(7, slots=4, each=8)
    found = relax(*posed, budget=Budget(deadline=0.0))
    assert torch.allclose(found.weights[1:17], torch.full((16,), 1 / 8, dtype=torch.float64))
    assert torch.allclose(found.weights[17:], torch.full((8,), 1 / 9, dtype=torch.float64))  # a slack is the ninth
    assert found.residual > 1
