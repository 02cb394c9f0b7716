"""A sweep of cells that cost nothing, to be killed: python sweep_script.py ROWS COUNT WORKERS [DASK_ADDRESS]."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from dager_tutorial.evaluation.sweep.pool import Engine
from dager_tutorial.evaluation.sweep.run import missing, run_sweep
from dager_tutorial.evaluation.sweep.store import Store

SECONDS = 0.01


def square(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Every seventh cell fails, always in the same way."""
    time.sleep(SECONDS)
    if cell["seed"] % 7 == 3:
        raise ValueError(f"seven and {cell['seed']}")
    return {"square": cell["seed"] ** 2}


def deadly(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Kills whoever does the sixth cell, as the system does where memory ends."""
    if cell["seed"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(cell)


def cells(count: int) -> list[dict[str, Any]]:
    return [{"model": "none", "corpus": "none", "batch_size": 1, "attack": "none", "seed": n} for n in range(count)]


if __name__ == "__main__":
    folder, count, workers, *address = sys.argv[1:]
    engine = Engine("dask", address=address[0]) if address else Engine(workers=int(workers))
    with Store(folder) as store:
        for row in run_sweep(missing(cells(int(count)), store), square, store, engine):
            print(row["seed"], flush=True)
