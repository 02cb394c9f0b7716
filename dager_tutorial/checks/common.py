"""What the checks of all chapters share: calling the reader's function and comparing what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def answer(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the reader's function returns, which must be something; its inputs must stay as they were.

    Args:
        function: The reader's function.
        arguments: What to call it with.

    Returns:
        Its value.

    Raises:
        AssertionError: It returned None, raised NotImplementedError, or changed a tensor it was given.
    """
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    name = getattr(function, "__name__", "the function")
    try:
        found = function(*arguments)
    except NotImplementedError:
        found = None
    assert found is not None, f"{name} returns nothing yet: put your code in place of the dots"
    for old, new in zip(before, arguments, strict=True):
        if isinstance(old, Tensor):
            assert torch.equal(old, new), f"{name} changes a tensor it was given: work on a copy"
    return found


def close(found: Any, expected: Tensor, what: str, *, tolerance: float = 1e-5, hint: str = "") -> None:
    """Compare a tensor with the expected one.

    Args:
        found: What the reader's function returned.
        expected: What it should be.
        what: A name for it, in messages.
        tolerance: Largest difference allowed, relative to the largest expected entry.
        hint: Added to the message where the numbers are wrong.

    Raises:
        AssertionError: Another type, shape, or other numbers.
    """
    assert isinstance(found, Tensor), f"{what} should be a tensor, not {type(found).__name__}"
    assert found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, should be {tuple(expected.shape)}"
    scale = max(float(expected.abs().max()), 1e-30)
    error = float((found.double() - expected.double()).abs().max()) / scale
    assert error <= tolerance, f"{what} is off by {error:.1e} of its largest entry. {hint}".strip()


def equal(found: Any, expected: Any, what: str, *, hint: str = "") -> None:
    """Compare a plain value (a number, a list, a set) with the expected one.

    Raises:
        AssertionError: It is another one.
    """
    assert found == expected, f"{what}: {found!r}, should be {expected!r}. {hint}".strip()


def passed(function: Callable[..., Any]) -> None:
    """Say that all is well."""
    print(f"{function.__name__}: passed")
