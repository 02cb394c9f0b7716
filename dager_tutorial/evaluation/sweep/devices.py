"""What a worker computes on, and how much memory it took: one GPU a worker, however workers are started.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.streaming import recomputed
from dager_tutorial.stopwatch import peak_memory_mb

LARGE = 0.25
"""Share of a GPU's memory that weights may take before intermediate results are spared."""


@functools.lru_cache(maxsize=1)
def claimed(device: str) -> str:
    """The device of this process: of several GPUs one that no other worker on this machine has, until it ends.

    Args:
        device: `cpu`, `cuda` or `mps`; a device with a number is taken as it is.

    Returns:
        The device's name; `cuda` has become `cuda:0`, `cuda:1`, ...

    Raises:
        DagerError: There is no GPU, or all are taken.
    """
    if device != "cuda":
        return device
    count = torch.cuda.device_count()
    for index in range(count):
        lock = _lock(str(getattr(torch.cuda.get_device_properties(index), "uuid", index)))
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _held.append(lock)
            return f"cuda:{index}"
    if not count:
        raise DagerError("there is no GPU here: use --device cpu")
    raise DagerError(f"all {count} GPUs are taken by other workers: start fewer with --workers")


_held: list[FileLock] = []
"""Claims of this process. The system drops them when it ends, in whatever way."""


def _lock(name: str) -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"dager-sweep-gpu-{name}.lock")


def forget_peaks(device: torch.device) -> None:
    """Begin to measure peaks anew, where the system lets one.

    Args:
        device: Where the cell computes.
    """
    with suppress(OSError):  # Linux only; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, Any]:
    """Peak memory since then, in megabytes: resident, and on the device if it has its own.

    Args:
        device: Where the cell computes.
    """
    own = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"peak_rss_mb": peak_memory_mb(), "peak_device_mb": own}


@contextmanager
def sparing(model: LanguageModel) -> Iterator[None]:
    """Let the client of a model that takes much of its GPU keep only what enters a block, and compute the rest again.

    Args:
        model: The model, as it is loaded.
    """
    large = False
    if model.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(model.device)
        large = torch.cuda.memory_allocated(model.device) > LARGE * total
    with recomputed(model.network) if large else nullcontext():
        yield
