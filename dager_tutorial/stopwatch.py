"""Where the time went, and how much memory was needed at the most."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil


@dataclass
class Stopwatch:
    """Wall-clock seconds of named stages. A stage that begins inside another one interrupts it.

    Attributes:
        begin: `time.perf_counter()` at the start.
        seconds: Seconds of each stage so far.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.stage("search"), watch.stage("subspace"):
        ...     pass
        >>> sorted(watch.report("filter", "search", "subspace"))
        ['filter', 'search', 'subspace', 'total']
    """

    begin: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for a stage, and not for the one around it."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        """Credit what has passed to the innermost open stage."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def report(self, *stages: str) -> dict[str, float]:
        """Seconds of these stages, 0 for those that never ran, and the total since the start."""
        return {name: self.seconds.get(name, 0.0) for name in stages} | {"total": time.perf_counter() - self.begin}


def available_memory() -> int:
    """Bytes of memory that this machine has free, without swapping."""
    return psutil.virtual_memory().available


def return_memory() -> None:
    """Hand back what was freed: glibc would keep it for this process."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries do it themselves
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
