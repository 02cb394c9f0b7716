"""Who does the cells: this process, local processes, or a cluster, all through joblib."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from dager_tutorial.errors import DagerError

ENGINES = ("local", "dask", "ray")
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
    def pool(self) -> Iterator[joblib.Parallel]:
        """What runs delayed calls and hands back results as they come.

        Raises:
            DagerError: The cluster's library is missing or its scheduler does not answer, or a worker was killed.
        """
        try:
            with self._configured():
                yield joblib.Parallel(n_jobs=self._jobs(), return_as="generator_unordered")
        except TerminatedWorkerError as error:
            raise DagerError(
                "a worker was killed, most likely for want of memory: the rows so far are kept; "
                "run again with fewer --workers"
            ) from error

    def _jobs(self) -> int:
        return self.workers if self.name == "local" else -1

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """Joblib's choice of where to run."""
        if self.name == "local":
            each = max(1, (os.cpu_count() or 1) // self.workers)
            with joblib.parallel_config("loky", inner_max_num_threads=each):
                yield
        elif self.name == "dask":
            with self._dask() as client, joblib.parallel_config("dask", client=client):
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
