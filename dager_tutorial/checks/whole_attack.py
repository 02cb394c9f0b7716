"""Checks of chapter `10_whole_attack`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn

from dager_tutorial.checks.common import answer, close, equal, passed

Tokens = list[int]


def _near(found: Any, expected: float, what: str, hint: str) -> None:
    """Compare a measure with the expected one."""
    assert isinstance(found, (int, float)), f"{what} should be a number, not {type(found).__name__}"
    assert abs(found - expected) < 1e-9, f"{what} is {found:.3f}, should be {expected:.3f}. {hint}"


def rouge_l(function: Callable[[Tokens, Tokens], float]) -> None:
    """ROUGE-L of two texts.

    Args:
        function: Takes the truth and the recovered text, lists of tokens; returns ROUGE-L, from 0 to 1.
    """
    cases = [
        ([5, 7], [7, 5], "In two swapped tokens one of them can be kept, not both."),
        ([1, 2, 3, 4], [1, 9, 2, 8, 4], "A subsequence may leave tokens out: 1, 2, 4 is one of both."),
        ([4, 4, 1, 6], [6, 4, 1, 4, 4], "It has to keep the order of both texts."),
        ([3, 1, 2], [3, 1, 2], "A text that came back exactly has ROUGE-L 1."),
        ([3, 1, 2], [], "Of nothing recovered it is 0."),
    ]
    scorer = RougeScorer(["rougeL"])
    for truth, found, hint in cases:
        words = (" ".join(map(str, tokens)) for tokens in (truth, found))
        expected = scorer.score(*words)["rougeL"].fmeasure
        _near(answer(function, truth, found), expected, f"ROUGE-L of {truth} and {found}", hint)
    passed(function)


def exact_fraction(function: Callable[[list[Tokens], list[Tokens]], float]) -> None:
    """The fraction of texts that came back exactly.

    Args:
        function: Takes the true texts and the recovered ones, lists of lists of tokens; returns the fraction.
    """
    batch = [[1, 2, 3], [4, 5], [1, 2], [4, 5]]
    cases = [
        ([[4, 5], [1, 2, 3], [1, 2]], 1.0, "Equal texts come back once, and each of them counts."),
        ([[9, 9], [1, 2], [8], [2, 1]], 0.25, "False texts cost nothing, the order of tokens counts."),
        ([[4, 5]], 0.5, "Both copies of a text are recovered by one."),
        ([], 0.0, "Nothing was recovered."),
    ]
    for found, expected, hint in cases:
        _near(answer(function, batch, found), expected, f"the fraction for {found}", hint)
    passed(function)


def captured_gradients(function: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    """The gradients of a module, to be saved as an update.

    Args:
        function: Takes a module after `backward`; returns name to gradient.
    """
    draw = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    module[0].bias.requires_grad_(False)
    module(torch.randn(5, 4, generator=draw)).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    found = answer(function, module)
    assert isinstance(found, dict), f"return a dictionary, not {type(found).__name__}"
    equal(sorted(found), sorted(expected), "the names", hint="Leave out what has no gradient.")
    module.zero_grad(set_to_none=False)  # the next step begins
    for name, gradient in expected.items():
        close(found[name], gradient, f"the gradient of {name}, after the next step began,", hint="Take a copy.")
    passed(function)


def distinct_prefixes(function: Callable[[list[dict[str, Any]]], int]) -> None:
    """The number of distinct prefixes, from what `dager inspect --json` wrote.

    Args:
        function: Takes the rows of an inspection; returns the number, 0 where no row tells it.
    """
    tokens = {"name": "block 0 query, key, value", "shape": [960, 576], "rank": 102, "gap": 2.5e4}
    prefixes = {"name": "block 0 attention output", "shape": [576, 576], "rank": 151, "gap": 9.0e2}
    noise = {"name": "block 2 query, key, value", "shape": [960, 576], "rank": 290, "gap": 1.1}
    last = {"name": "block 3 attention output", "shape": [576, 576], "rank": 4, "gap": 1.6e7}
    full = {"name": "block 1 query, key, value", "shape": [960, 576], "rank": 576, "gap": None}
    rows = {False: [tokens, prefixes, noise, last], True: [full]}
    clear, saturated = ([row | {"saturated": flag} for row in group] for flag, group in rows.items())
    cases = [
        (clear, 151, "Block 0's queries, keys and values count tokens, the last block texts."),
        (clear[::-1], 151, "The order of the rows means nothing."),
        (clear[2:3], 0, "Where the gap is about 1 the rank is a guess."),
        (saturated, 0, "A rank that has reached the width says only: at least so many."),
        (saturated + clear, 151, "Leave out the row that is saturated, keep the others."),
    ]
    for given, expected, hint in cases:
        equal(answer(function, given), expected, "the number of prefixes", hint=hint)
    passed(function)


class Counts(NamedTuple):
    """What the attack on a causal model has counted when it ends.

    Attributes:
        rank: Rank of block 0; None where its gradient is missing or zero.
        prefixes: Different prefixes that were confirmed.
        promised: Different prefixes that a clear rank counts; None where noise hides it.
        texts: Texts that are reported.
        ends: Those of them that end where the last block has a row; None where it shows no ends.
        promised_ends: Ends that a clear rank of the last block counts; None where noise hides it.
    """

    rank: int | None = 40
    prefixes: int = 55
    promised: int | None = 55
    texts: int = 4
    ends: int | None = 4
    promised_ends: int | None = 4


STATUSES = (
    (Counts(), "texts_complete", "All promised prefixes were confirmed, and every text to its end."),
    (Counts(ends=None, promised_ends=None), "rows_complete", "Every row is explained, and nothing shows the ends."),
    (Counts(promised_ends=None), "rows_complete", "Noise hides how many ends there are: one may be missing."),
    (Counts(promised_ends=5), "rows_complete", "Every row is explained; one end more is promised than was found."),
    (Counts(ends=3), "partial", "A text ends where the last block has no row."),
    (Counts(prefixes=50), "partial", "Prefixes are missing."),
    (Counts(prefixes=57), "partial", "More pass than there can be: some are too alike to be told apart."),
    (Counts(promised=None), "ends_confirmed", "The prefixes cannot be counted, but the ends can."),
    (Counts(promised=None, ends=3), "partial", "One of the texts is not confirmed to its end."),
    (Counts(promised=None, promised_ends=5), "partial", "The last block has one end more than was confirmed."),
    (Counts(promised=None, promised_ends=None), "partial", "Without any promised number nobody knows what is missing."),
    (Counts(promised=None, ends=None, promised_ends=None), "partial", "Nothing can be counted here."),
    (Counts(rank=None, prefixes=0, texts=0, ends=None), "no_signal", "Nothing was shared that could be tested."),
    (Counts(rank=0, prefixes=0, texts=0, ends=None), "noise", "A rank of 0: nothing stands out from noise."),
    (Counts(prefixes=0, texts=0, ends=None), "wrong_model", "There is a span, and no text lies in it."),
    (Counts(prefixes=0, promised=None, texts=0, ends=None), "wrong_model", "There is a span, and no text lies in it."),
)
"""Counts, the status that belongs to them, and what to think of where an answer differs."""


def status(function: Callable[[Counts], str]) -> None:
    """The status of an attack that ended in time and did not saturate.

    Args:
        function: Takes `Counts`; returns the status.
    """
    for counts, expected, hint in STATUSES:
        equal(answer(function, counts), expected, f"the status for {counts}", hint=hint)
    passed(function)
