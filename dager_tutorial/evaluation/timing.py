"""How long a call takes, on the wall and on the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from dager_tutorial.server.budget import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What a call returned, and what it took.

    Attributes:
        result: What it returned.
        seconds: Wall-clock seconds.
        cpu_seconds: Seconds of processor time, all threads of the process together.
    """

    result: T
    seconds: float
    cpu_seconds: float


def timed(call: Callable[[], T]) -> Timed[T]:
    """Call a function and time it.

    Args:
        call: A function without arguments.

    Example:
        >>> timed(lambda: 6 * 7).result
        42
    """
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return Timed(result, time.perf_counter() - wall, time.process_time() - processor)


def warm_up(device: torch.device) -> None:
    """Let torch load its libraries and start its threads, before the clock runs.

    Args:
        device: Where the attack will compute.
    """
    matrix = torch.eye(64, dtype=torch.float64, device=device)
    torch.linalg.svd(torch.linalg.qr(matrix @ matrix).R)
    (matrix.float() @ matrix.float()).softmax(-1).sum().item()


def labelled(progress: Progress | None, party: str) -> Progress | None:
    """The same callback, with the name of a party in front of the stage.

    Args:
        progress: Who listens, or None.
        party: The name.
    """
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{party}: {stage}", done, total)
