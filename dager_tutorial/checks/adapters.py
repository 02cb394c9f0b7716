"""Checks of chapter `13_adapters`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dager_tutorial.checks.common import answer, close, equal, passed

__all__ = ["gradients_of_adapter", "last_gradient", "moved_tokens", "principal_adapter"]


def gradients_of_adapter(function: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> None:
    """The gradients of the two thin matrices of an adapted map.

    Args:
        function: Takes inputs (rows x inputs), what comes back (rows x outputs), A (rank x inputs), B (outputs x rank)
            and the scaling; returns the gradients of A and of B.
    """
    draw = torch.Generator().manual_seed(0)
    for rows, inputs, outputs, rank, scaling in ((4, 7, 5, 2, 0.5), (3, 6, 9, 4, 3.0)):
        shapes = ((rows, inputs), (rows, outputs), (rank, inputs), (outputs, rank))
        X, G, A, B = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
        A.requires_grad_(True)
        B.requires_grad_(True)
        expected = torch.autograd.grad((scaling * (X @ A.T) @ B.T * G).sum(), (A, B))
        A, B = A.detach(), B.detach()
        found = answer(function, X, G, A, B, scaling)
        assert isinstance(found, tuple) and len(found) == 2, "return two tensors: the gradients of A and of B"
        close(found[0], expected[0], "the gradient of A", hint="Chain rule: X enters A, and B stands behind it.")
        close(found[1], expected[1], "the gradient of B", hint="B is a linear map; what enters it is X A^T.")
    passed(function)


def principal_adapter(function: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """An adapter of a weight's largest singular directions, and the weight that stays frozen beside it.

    Args:
        function: Takes a weight (outputs x inputs) and a rank; returns A (rank x inputs), B (outputs x rank) and the
            frozen rest (outputs x inputs).
    """
    draw = torch.Generator().manual_seed(1)
    for outputs, inputs, rank in ((6, 9, 2), (8, 5, 3)):
        weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
        found = answer(function, weight, rank)
        assert isinstance(found, tuple) and len(found) == 3, "return three tensors: A, B and the frozen rest"
        A, B, rest = found
        equal(tuple(A.shape), (rank, inputs), "the shape of A")
        equal(tuple(B.shape), (outputs, rank), "the shape of B")
        U, values, V = torch.linalg.svd(weight, full_matrices=False)
        best = U[:, :rank] * values[:rank] @ V[:rank]
        close(B @ A, best, "B A", hint="Keep the largest singular values.")
        close(rest + B @ A, weight, "the rest plus B A", hint="Before the first step the model must be as it was.")
        equal_lengths = torch.allclose(A.norm(dim=1), B.norm(dim=0))
        assert equal_lengths, "share each singular value evenly: its root goes to A, its root to B"
    passed(function)


def last_gradient(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """The gradient of the last step, from Adam's running means after it and before it.

    Args:
        function: Takes the mean after the step, the mean before it, and the share that is kept; returns the gradient.
    """
    draw = torch.Generator().manual_seed(2)
    for kept in (0.9, 0.5):
        before, gradient = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
        now = kept * before + (1 - kept) * gradient
        hint = "Solve the recursion for the newest gradient, its factor included."
        close(answer(function, now, before, kept), gradient, "the gradient of the last step", hint=hint)
    passed(function)


def moved_tokens(function: Callable[[Tensor, Tensor, float], set[int]]) -> None:
    """The tokens of a batch, from embeddings before and after one step of AdamW with weight decay.

    Args:
        function: Takes the embeddings before and after (vocabulary x width) and the product of learning rate and weight
            decay; returns a set of token ids.
    """
    draw = torch.Generator().manual_seed(3)
    for decay, tokens in ((0.0, {1, 4}), (1e-2, {0, 2, 7}), (1e-3, set())):
        before = torch.randn(9, 6, generator=draw)
        after = before * (1 - decay)
        for token in tokens:
            after[token] += 1e-3 * torch.randn(6, generator=draw).sign()
        found = answer(function, before, after, decay)
        hint = "Every row shrinks; rounding leaves some 1e-7 of it, a step of Adam about the learning rate."
        equal(set(map(int, found)), tokens, f"the tokens that moved under a decay of {decay:g}", hint=hint)
    passed(function)
