"""What a run may cost: the user's limits, and the budget that every stage is handed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dager_tutorial.errors import DagerError

Progress = Callable[[str, int, int | None], None]
"""Called with a stage, what is done of it, and the total or None."""

PARTS = frozenset({"incidence", "relaxation", "polish"})
"""Parts of the encoder search that an ablation may leave out."""


@dataclass(frozen=True)
class AttackConfig:
    """What a run may cost. There is nothing to tune.

    Attributes:
        seed: Seed of the random projections that screen candidates.
        time_budget: Seconds after which every stage returns what it has; None for no limit.
        memory_mb: Megabytes that intermediate results may take, besides model and update.
        without: Parts of the encoder search to leave out, for ablations: any of `PARTS`.
        stop: Asked often; once it says yes, every stage returns what it has, as when the time is spent. None for never.
        complete: Whether what the search finds is completed: weighed, taken off the update, searched again and
            proven. It costs one to two steps of the client.
        prompt: What every text is known to begin with, as the template of an instruction. Where the update does not
            hold it the diagnosis says so, and the search goes on without it.

    Raises:
        DagerError: A limit that no run can keep, or an unknown part.

    Example:
        >>> AttackConfig(time_budget=60.0).memory_mb
        512
    """

    seed: int = 0
    time_budget: float | None = None
    memory_mb: int = 512
    without: frozenset[str] = frozenset()
    stop: Callable[[], bool] | None = None
    complete: bool = True
    prompt: str = ""

    def __post_init__(self) -> None:
        """Refuse budgets that no run can keep."""
        if self.time_budget is not None and not self.time_budget > 0:
            raise DagerError(f"time_budget is {self.time_budget}: give a positive number of seconds, or None")
        if self.memory_mb < 16:
            raise DagerError(f"memory_mb is {self.memory_mb}: give at least 16")
        unknown = sorted(self.without - PARTS)
        if unknown:
            raise DagerError(f"without names {unknown[0]!r}: the encoder search has {', '.join(sorted(PARTS))}")


@dataclass(frozen=True)
class Budget:
    """What is left to spend, for every stage alike.

    Attributes:
        memory: Bytes that intermediate results may take.
        deadline: Value of `time.perf_counter()` at which to stop; infinite for never.
        seed: Seed of everything drawn.
        progress: Who listens to progress, or None.
        stop: Says whether to stop at once, or None.

    Example:
        >>> Budget(memory=1000).chunk(300), Budget(deadline=0.0).late
        (3, True)
    """

    memory: int = 2**29
    deadline: float = math.inf
    seed: int = 0
    progress: Progress | None = None
    stop: Callable[[], bool] | None = None

    @classmethod
    def of(cls, config: AttackConfig, begin: float, progress: Progress | None = None) -> Budget:
        """The budget of a run.

        Args:
            config: The user's limits.
            begin: `time.perf_counter()` when the run began.
            progress: Who listens to progress, or None.
        """
        deadline = math.inf if config.time_budget is None else begin + config.time_budget
        return cls(config.memory_mb * 2**20, deadline, config.seed, progress, config.stop)

    @property
    def late(self) -> bool:
        """Whether the time is spent, or somebody wants the run to stop."""
        return time.perf_counter() > self.deadline or (self.stop is not None and self.stop())

    def report(self, stage: str, done: int, total: int | None = None) -> None:
        """Tell whoever listens how far a stage is."""
        if self.progress is not None:
            self.progress(stage, done, total)

    def chunk(self, bytes_each: int) -> int:
        """How many entries of so many bytes fit into memory at once; at least one."""
        return max(1, self.memory // max(1, bytes_each))

    def generator(self) -> torch.Generator:
        """A fresh source of randomness, on the CPU, the same at every call."""
        return torch.Generator().manual_seed(self.seed)
