"""Checks of chapter `09_completion`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

Pairs = list[tuple[int, int]]
Ids = tuple[int, ...]


def weigh(function: Callable[[Tensor, Tensor, Tensor], tuple[int, Pairs] | None]) -> None:
    """Exercise "labels and copies by regression".

    Args:
        function: Takes columns (numbers x texts), the target (numbers) and the probabilities of class 1 (texts),
            float64; returns the size of the batch and each text's copies with label 0 and 1, or None.
    """
    batches: tuple[tuple[list[float], Pairs, int, str], ...] = (
        ([0.3, 0.58], [(1, 0), (0, 1)], 2, "two texts, each once"),
        ([0.3, 0.58, 0.45], [(2, 0), (0, 1), (0, 1)], 4, "a text that occurs twice"),
        ([0.41, 0.63, 0.52], [(1, 1), (0, 3), (1, 0)], 6, "a text with both labels"),
        ([0.41, 0.63, 0.52], [(2, 1), (0, 1), (1, 0)], 7, "two texts of the batch are not among the columns"),
    )
    for seed, (chances, pairs, size, what) in enumerate(batches):
        columns = torch.randn(40, len(pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target = columns @ _weights(chances, pairs, size)
        found = answer(function, columns, target, torch.tensor(chances, dtype=torch.float64))
        assert isinstance(found, tuple) and len(found) == 2, "return the size and the list of pairs"
        hint = "Are copies counted for every size anew, the smallest size first?"
        equal(int(found[0]), size, f"the size of the batch ({what})", hint=hint)
        hint = "kappa_1 is kappa times pi less B times beta; kappa_0 is the others."
        equal([tuple(map(int, pair)) for pair in found[1]], pairs, f"the copies ({what})", hint=hint)
    columns = torch.eye(2, dtype=torch.float64)
    nothing = function(columns, torch.tensor([0.0101, 0.2718], dtype=torch.float64), torch.full((2,), 0.3).double())
    equal(nothing, None, "the answer where no size fits")
    passed(function)


def _weights(chances: list[float], pairs: Pairs, size: int) -> Tensor:
    """The gradients in the second logit."""
    of_each = [(sum(pair) * chance - pair[1]) / size for chance, pair in zip(chances, pairs, strict=True)]
    return torch.tensor(of_each, dtype=torch.float64)


def weights_of(function: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> None:
    """Exercise "weights by rank reduction".

    Args:
        function: Takes the gradient (outputs x inputs), its rank, inputs (texts x inputs) and slopes (texts x outputs),
            float64; returns weights (texts), 0 for texts that are not in the gradient.
    """
    by_hand = torch.tensor([[0.5, 0.0, 0.5], [0.5, -0.25, 0.25], [0.0, -0.25, -0.25]], dtype=torch.float64)
    row, back = torch.tensor([[1.0, 0.0, 1.0]]).double(), torch.tensor([[1.0, 1.0, 0.0]]).double()
    hint = "It is 1 / (x M^+ G^T), and of M^+ just as many directions as the rank."
    close(answer(function, by_hand, 2, row, back), torch.tensor([0.5]), "the weight in the 3 x 3 matrix", hint=hint)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        inputs, slopes = (torch.randn(5, width, generator=draw, dtype=torch.float64) for width in (20, 16))
        weights = torch.tensor([0.3, -0.2, 0.05, 0.4, -0.1], dtype=torch.float64)
        noise = 1e-9 * torch.randn(16, 20, generator=draw, dtype=torch.float64)
        gradient = (slopes * weights[:, None]).T @ inputs + noise
        found = answer(function, gradient, 5, inputs[:3], slopes[:3])
        close(found, weights[:3], "the weights, two texts unknown", tolerance=1e-4, hint=hint)
        mixed = torch.stack([inputs[0], inputs.new_ones(20)]), torch.stack([slopes.new_ones(16), slopes[0]])
        found = answer(function, gradient, 5, *mixed)
        close(found, torch.zeros(2), "the weights of texts of which one vector lies outside")
    passed(function)


def ended(function: Callable[[Mapping[Ids, Mapping[int, int]]], Mapping[Ids, int]]) -> None:
    """Exercise "texts that end": whole texts from what follows each prefix.

    Args:
        function: Takes for each prefix how often each token follows it; returns whole texts with their copies.
    """
    batches: tuple[tuple[list[Ids], str], ...] = (
        ([(1, 2, 3)], "one text"),
        ([(1, 2, 3), (1, 2, 3), (1, 4)], "a text that occurs twice"),
        ([(1, 2), (1, 2, 3, 4), (1, 2, 3, 5)], "a text that begins others"),
        ([(7, 7), (7, 7, 7), (7, 7, 7), (2, 7)], "a token that follows itself"),
    )
    for texts, what in batches:
        follow: dict[Ids, Any] = {}
        for text in texts:
            for end in range(1, len(text)):
                follow.setdefault(text[:end], Counter())[text[end]] += 1
        found = answer(function, {prefix: dict(counts) for prefix, counts in follow.items()})
        assert isinstance(found, Mapping), f"return a dictionary, not {type(found).__name__}"
        hint = "Of the texts that go on, as many are used up as the longer prefix counts itself."
        equal({text: int(count) for text, count in found.items()}, dict(Counter(texts)), what, hint=hint)
    passed(function)
