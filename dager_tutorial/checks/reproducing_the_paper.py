"""Checks of chapter `15_reproducing_the_paper`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

__all__ = ["belongs", "failure_limit", "interval"]

ROW = {
    "model": "random:gpt2",
    "corpus": "cola",
    "batch_size": 2,
    "attack": "dager",
    "seed": 3,
    "rouge1": 1.0,
    "seconds.attack": 2.0,
    "sent.bytes": 10,
    "version.torch": "2",
}
"""A row without options."""

WANTED = {"model": "random:gpt2", "corpus": "cola", "batch_size": 2, "attack": "dager"}

CASES: tuple[tuple[Mapping[str, Any], Mapping[str, Any], bool, str], ...] = (
    ({}, {}, True, "Names with a dot may be measures: `seconds.attack` is no option."),
    ({"batch_size": 4}, {}, False, "It has another batch size."),
    ({"client.loss": "frobenius"}, {}, False, "The client had another loss, for which the cell does not ask."),
    ({"training.epochs": 2}, {}, False, "The client trained for two epochs."),
    ({"defence.noise.deviation": 1e-4}, {}, False, "There was noise; its name has two dots."),
    ({"model.blocks": 3}, {}, False, "The model was cut."),
    ({"client.loss": "frobenius"}, {"client.loss": "frobenius"}, True, "The cell asks for just this loss."),
    ({}, {"client.loss": "frobenius"}, False, "The cell asks for a loss that the row has not."),
)
"""What a row and a cell have besides, whether they belong together, and why."""


def belongs(function: Callable[[dict[str, Any], dict[str, Any]], bool]) -> None:
    """Exercise "may it stand there": whether a row of a sweep answers what a cell asks.

    Args:
        function: Takes a row and what is wanted, both by dotted names; returns True or False.
    """
    for more, asked, expected, why in CASES:
        found = answer(function, {**ROW, **more}, {**WANTED, **asked})
        equal(bool(found), expected, f"a row with {dict(more)} for a cell that asks {dict(asked)} besides", hint=why)
    passed(function)


def interval(function: Callable[[Tensor, Tensor], tuple[float, float]]) -> None:
    """Exercise "an interval from draws": the percentiles of the means of resamples.

    Args:
        function: Takes values (batches) and draws (resamples x batches); returns the lower and the upper end.
    """
    draw = torch.Generator().manual_seed(0)
    for count in (1, 4, 30):
        values = torch.rand(count, generator=draw, dtype=torch.float64)
        draws = torch.randint(count, (500, count), generator=draw)
        means = values[draws].mean(1)
        expected = torch.stack([means.quantile(0.025), means.quantile(0.975)])
        found = torch.tensor([float(end) for end in answer(function, values, draws)], dtype=torch.float64)
        hint = "A mean for each resample first, then the percentiles of those means."
        close(found, expected, f"the interval of {count} values", hint=hint)
    passed(function)


def failure_limit(function: Callable[[int, int], float]) -> None:
    """Exercise "failures among batches": the largest share of failures at which so few are no miracle.

    Args:
        function: Takes the numbers of batches and of failures; returns a share from 0 to 1.
    """
    equal(round(float(answer(function, 3, 3)), 6), 1.0, "the limit when every batch failed")
    for batches, failures in ((2, 0), (100, 0), (10, 1), (100, 7), (5, 4)):
        found = float(answer(function, batches, failures))
        chance = float(binom.cdf(failures, batches, found))
        what = f"at a share of {found:.4f}, at most {failures} failures of {batches}"
        hint = "Both tails are too many: only few failures would be the miracle here."
        assert abs(chance - 0.05) < 1e-3, f"{what} have a chance of {chance:.4f}, should be 0.05. {hint}"
    passed(function)
