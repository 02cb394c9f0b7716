"""What one run of the attack shares, whatever the architecture: its budget, its clock, and how it reports."""

from __future__ import annotations

import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .encoder import PARTS
from .errors import DagerError
from .evidence import Evidence
from .models import LanguageModel
from .reconstruction import Reconstruction
from .subspace import CLEAR_GAP, Span

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class AttackConfig:
    """What a run may cost. There is nothing to tune.

    Attributes:
        seed: Seed of the random projections that screen candidates.
        time_budget: Seconds after which the search returns what it has; None for no limit.
        memory_mb: Megabytes that intermediate results may take, besides model and update.
        without: Parts of the encoder search to leave out, for ablations: any of `PARTS`.
    """

    seed: int = 0
    time_budget: float | None = None
    memory_mb: int = 512
    without: frozenset[str] = frozenset()

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
class Outcome:
    """What a search came to.

    Attributes:
        sequences: Token ids of each text.
        scores: The residual ratio of each.
        status: One of the statuses of a reconstruction.
        diagnosis: One sentence for people.
    """

    sequences: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    status: str
    diagnosis: str


@dataclass
class Run(ABC):
    """One run of the attack: subclasses say how a kind of architecture is searched."""

    model: LanguageModel
    evidence: Evidence
    config: AttackConfig
    progress: Progress | None
    begin: float
    seconds: dict[str, float] = field(default_factory=lambda: {"subspace": 0.0, "filter": 0.0, "search": 0.0})

    @abstractmethod
    def search(self) -> Outcome:
        """Find the texts, and add the seconds that each stage took to `seconds`."""

    def reconstruction(self) -> Reconstruction:
        """Search, and put everything a reader may want to know into one record."""
        outcome = self.search()
        self.seconds["subspace"] = self.evidence.seconds
        self.seconds["total"] = time.perf_counter() - self.begin
        return Reconstruction(
            sequences=outcome.sequences,
            texts=tuple(map(self.model.text_of, outcome.sequences)),
            scores=outcome.scores,
            status=outcome.status,
            diagnosis=outcome.diagnosis,
            seconds=self.seconds,
            ranks={tap.name: span.rank for tap, span in self.evidence.spans.items() if span is not None},
            model=self.model.name,
            n_parameters_used=self.evidence.parameters_used,
            peak_rss_mb=peak_memory_mb(),
        )

    def deadline(self) -> float | None:
        """The `time.perf_counter()` at which the search has to stop, or None."""
        return None if self.config.time_budget is None else self.begin + self.config.time_budget

    def late(self) -> bool:
        """Whether the time budget is spent."""
        deadline = self.deadline()
        return deadline is not None and time.perf_counter() > deadline

    def report(self, stage: str) -> Callable[[int, int | None], None] | None:
        """A callback for one stage's progress, or None where nobody listens."""
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(stage, done, total)


def expected_rows(spans: Iterable[Span]) -> int | None:
    """The number of distinct rows of the batch, where a rank with a clear gap tells it."""
    clear = [span.rank for span in spans if span.gap >= CLEAR_GAP and not span.saturated]
    return max(clear, default=None)


def peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
