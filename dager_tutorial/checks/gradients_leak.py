"""Checks of chapter `01_gradients_leak`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dager_tutorial.checks.common import answer, close, equal, passed


def _layer_gradients(seed: int, *, dead: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight gradient and bias gradient of a linear layer that saw one vector; `dead` outputs have none.

    The dead ones are the first outputs, or the last ones where `dead` is negative.
    """
    draw = torch.Generator().manual_seed(seed)
    vector, gradient = torch.randn(7, generator=draw), torch.randn(5, generator=draw)
    gradient[slice(dead, None) if dead < 0 else slice(dead)] = 0
    return vector, vector[:, None] * gradient, gradient


def input_of_linear_layer(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise "the input of a linear layer": the one vector that it saw, from the gradients of weight and bias.

    Args:
        function: Takes dL/dW (inputs x outputs) and dL/db (outputs); returns the input (inputs).
    """
    for seed, dead in ((0, 0), (1, 1), (2, 4), (3, -2)):
        vector, weight, bias = _layer_gradients(seed, dead=dead)
        hint = "Some outputs have no gradient at all: do not divide by zero." if dead else "Look at one column of dW."
        close(answer(function, weight, bias), vector, "the input", hint=hint)
    passed(function)


def seen_candidate(function: Callable[[Tensor, Tensor], int]) -> None:
    """Exercise "which candidate?": the one vector that a layer without bias saw, among candidates.

    Args:
        function: Takes dL/dW (inputs x outputs) and candidates (candidates x inputs); returns an index.
    """
    for seed, (dead, factor) in enumerate(((0, 1.0), (1, 1.0), (4, 1.0), (0, -0.01), (-3, -20.0))):
        draw = torch.Generator().manual_seed(seed)
        vector, weight, _ = _layer_gradients(seed, dead=dead)
        candidates = torch.randn(6, 7, generator=draw)
        candidates[0] += 30 * candidates[1]  # long ones have large products with anything
        candidates[seed] = factor * vector
        hint = "Compare directions: length and sign of a candidate mean nothing."
        hint = "Some columns are zero: choose one that is not." if dead else hint
        equal(int(answer(function, weight, candidates)), seed, "the index", hint=hint)
    passed(function)


def label_of_text(function: Callable[[Tensor], int]) -> None:
    """Exercise "the label": that of a single text, from the gradient of a classifier's output bias.

    Args:
        function: Takes dL/db (classes), the gradient of a cross-entropy loss; returns the class.
    """
    draw = torch.Generator().manual_seed(0)
    for label, classes in ((2, 5), (0, 5), (4, 5), (0, 2), (1, 2)):  # of two classes, both entries are equally large
        bias = torch.randn(classes, generator=draw).requires_grad_()
        loss = cross_entropy(bias[None], torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, bias)
        hint = "Write the gradient as probabilities minus one-hot label: which entry can be negative?"
        equal(int(answer(function, gradient)), label, "the label", hint=hint)
    passed(function)


def tokens_and_length(function: Callable[[Tensor, Tensor], tuple[Iterable[int], int]]) -> None:
    """Exercise "tokens and length": the tokens of a batch and the length of its longest text, from two embeddings.

    Args:
        function: Takes the gradients of the token embeddings (vocabulary x width) and of the position embeddings
            (positions x width); returns the token ids in rising order and the length of the longest text.
    """
    texts = [[4, 2, 9], [7, 2, 2, 11, 5]]
    draw = torch.Generator().manual_seed(0)
    tokens, positions = torch.zeros(13, 6), torch.zeros(8, 6)
    for text in texts:
        for position, token in enumerate(text):
            row = torch.randn(6, generator=draw)
            tokens[token] += row
            positions[position] += row
    tokens[4], positions[0] = -tokens[4].abs(), torch.tensor([1.0, -1, 0, 0, 0, 0])  # signs and sums mean nothing
    found = answer(function, tokens, positions)
    assert isinstance(found, tuple) and len(found) == 2, "return two things: the token ids, and the length"
    ids, length = found
    equal([int(token) for token in ids], [2, 4, 5, 7, 9, 11], "the tokens", hint="A row counts if any entry is not 0.")
    equal(int(length), 5, "the longest text", hint="Each position that some text reaches has a gradient.")
    passed(function)
