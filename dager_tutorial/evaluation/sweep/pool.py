"""Who does the cells: this process, local processes, or a cluster, all through joblib.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from dager_tutorial.errors import DagerError

ENGINES = ("local", "dask", "ray")
Pool = Callable[[Iterable[Any]], Iterable[Any]]
"""Called with joblib's delayed calls; gives their results in any order."""

ROUND = 4
"""Calls for each processor of a Ray cluster: its joblib backend hands results back when all of a round are done."""

INSTALL = "pip install 'dager-tutorial[{}]'"


@dataclass(frozen=True)
class Engine:
    """Where cells are done.

    Attributes:
        name: `local` (processes of this machine), `dask` or `ray`.
        workers: Number of local processes; a cluster has as many as it has.
        address: Where the cluster's scheduler listens; for `ray` empty to start one here.

    Raises:
        DagerError: There is no such engine, or `dask` has no address.

    Example:
        >>> Engine("dask")
        Traceback (most recent call last):
        dager_tutorial.errors.DagerError: engine dask needs --address, such as tcp://127.0.0.1:8786
    """

    name: str = "local"
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no engine."""
        if self.name not in ENGINES:
            raise DagerError(f"engine {self.name!r}: choose one of {', '.join(ENGINES)}")
        if self.name == "dask" and not self.address:
            raise DagerError("engine dask needs --address, such as tcp://127.0.0.1:8786")

    @contextmanager
    def pool(self) -> Iterator[Pool]:
        """What runs delayed calls and hands back results as they come.

        Raises:
            DagerError: The cluster's library is missing or its scheduler does not answer, or a worker was killed.
        """
        try:
            with self._configured():
                yield (
                    _in_rounds if self.name == "ray" else joblib.Parallel(self.workers, return_as="generator_unordered")
                )
        except TerminatedWorkerError as error:
            raise DagerError(
                "a worker was killed, most likely for want of memory: the rows so far are kept; "
                "run again with fewer --workers"
            ) from error

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """Joblib's choice of where to run."""
        if self.name == "local":
            each = max(1, (os.cpu_count() or 1) // self.workers)
            with joblib.parallel_config("loky", inner_max_num_threads=each):
                yield
        elif self.name == "dask":
            with (
                self._dask() as client,
                joblib.parallel_config("dask", client=client),
            ):  # joblib asks it for all workers
                yield
        else:
            self._ray()
            with joblib.parallel_config("ray"):
                yield

    @contextmanager
    def _dask(self) -> Iterator[Any]:
        try:
            from distributed import Client
        except ImportError:
            raise DagerError(f"engine dask needs Dask: {INSTALL.format('dask')}") from None
        try:
            client = Client(self.address, set_as_default=False, timeout=10)
        except (OSError, ValueError) as error:
            raise DagerError(f"no Dask scheduler answers at {self.address} ({error})") from error
        with client:
            yield client

    def _ray(self) -> None:
        try:
            import ray
            from ray.util.joblib import register_ray
        except ImportError:
            raise DagerError(f"engine ray needs Ray: {INSTALL.format('ray')}") from None
        if not ray.is_initialized():
            ray.init(address=self.address or None)
        register_ray()


def _in_rounds(calls: Iterable[Any]) -> Iterator[Any]:
    """Results of a backend that keeps them to itself until all are there: a few calls at a time."""
    import ray

    left, size = iter(calls), ROUND * max(1, int(ray.cluster_resources().get("CPU", 1)))
    while part := list(itertools.islice(left, size)):
        yield from joblib.Parallel(n_jobs=-1)(part)
