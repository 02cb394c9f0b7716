"""Checks of chapter `03_span`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

Pairs = list[tuple[int, int]]


def _mixed(seed: int, rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Input rows, and a gradient (outputs x inputs) that mixes them, float64."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
    return vectors, torch.randn(outputs, rows, generator=draw, dtype=torch.float64) @ vectors


def relative_distance(function: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """How far vectors lie from the row space of a gradient, relative to their lengths.

    Args:
        function: Takes a gradient (outputs x inputs), vectors (rows x inputs) and the gradient's rank; returns the
            distances (rows).
    """
    for seed, outputs in ((0, 30), (1, 8)):
        inputs, gradient = _mixed(seed, 5, outputs, 12)
        strangers = 100 * torch.randn(3, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        found = answer(function, gradient, torch.cat([inputs, strangers]), 5)
        # An oracle of another kind: the least-squares fit of a vector by the inputs.
        fit = torch.linalg.lstsq(inputs.T, strangers.T, driver="gelsd").solution
        expected = (strangers - (inputs.T @ fit).T).norm(dim=1) / strangers.norm(dim=1)
        hint = "Divide by the length of each vector: the strangers are a hundred times as long as the inputs."
        close(found, torch.cat([torch.zeros(5, dtype=torch.float64), expected]), "the distance", hint=hint)
    passed(function)


def lost_directions(function: Callable[[Pairs], Tensor]) -> None:
    """The directions that block 0's inputs lose where tokens and positions are added.

    Args:
        function: Takes pairs of token and position; returns numbers on the vertices, a row for each component: first
            the tokens in ascending order, then the positions.
    """
    batches = [
        [(0, 0), (1, 1), (2, 2), (2, 1), (1, 2)],
        [(7, 0), (3, 1), (9, 2)],
        [(5, 0), (6, 0), (5, 1), (8, 2), (8, 3), (4, 2)],
        [(4, 0), (6, 1), (5, 2), (4, 1), (5, 0)],  # two groups that a later pair joins
    ]
    for pairs in batches:
        found = answer(function, pairs)
        assert isinstance(found, Tensor), f"return a tensor, not {type(found).__name__}"
        rows = _incidence(pairs)
        assert found.ndim == 2 and found.shape[1] == rows.shape[1], "a column for each token, then for each position"
        off = float((rows @ found.double().T).abs().max())
        assert off < 1e-9, f"{pairs}: numbers of a token and a position of one pair must add up to zero"
        lost = rows.shape[1] - int(torch.linalg.matrix_rank(rows))
        equal(len(found), lost, f"the number of directions for {pairs}", hint="One for each component.")
        independent = int(torch.linalg.matrix_rank(found.double()))
        equal(independent, lost, "independent directions", hint="Zero outside the component, 1 and -1 inside.")
    passed(function)


def _incidence(pairs: Pairs) -> Tensor:
    """Pairs x (tokens, positions), float64: a 1 for the token and a 1 for the position of each pair."""
    tokens, places = sorted({token for token, _ in pairs}), sorted({place for _, place in pairs})
    rows = torch.zeros(len(pairs), len(tokens) + len(places), dtype=torch.float64)
    for row, (token, place) in zip(rows, pairs, strict=True):
        row[tokens.index(token)] = row[len(tokens) + places.index(place)] = 1
    return rows


def rotary_ranks(function: Callable[[Sequence[Sequence[int]]], tuple[int, int]]) -> None:
    """The ranks of blocks 0 and 1 of a causal rotary model whose tokenizer adds nothing.

    Args:
        function: Takes token ids, a list for each text; returns the two ranks.
    """
    hints = {
        "plain": "Count different tokens, then different prefixes.",
        "shared": "Equal prefixes of two texts are one row.",
        "repeated": "A first token repeated, [4], [4, 4], [4, 4, 4], is one row in block 1.",
    }
    batches = [
        ([[3, 5, 7], [8, 9]], (5, 5), "plain"),
        ([[3, 5, 7], [3, 5], [3, 6, 5], [3, 5, 7]], (4, 5), "shared"),
        ([[4, 4, 4, 6], [4, 4], [6, 6]], (2, 3), "repeated"),
        ([[4, 6, 6, 6], [2, 4, 4]], (3, 7), "plain"),
    ]
    for ids, expected, kind in batches:
        found = answer(function, ids)
        assert isinstance(found, tuple) and len(found) == 2, "return two numbers: the ranks of blocks 0 and 1"
        equal((int(found[0]), int(found[1])), expected, f"the ranks for {ids}", hint=hints[kind])
    passed(function)
