"""Rows survive torn lines, kills at any moment, a second sweep in the same folder, and workers that die."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_script
from sweep_script import cells, deadly, square

from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.sweep import store
from dager_tutorial.evaluation.sweep.cells import key_of
from dager_tutorial.evaluation.sweep.pool import Engine
from dager_tutorial.evaluation.sweep.run import Estimate, missing, row_of, run_sweep
from dager_tutorial.evaluation.sweep.store import DAMAGED, ROWS, Store, read_rows

SCRIPT = Path(sweep_script.__file__)
MEASURED = ("date", "seconds.cell")  # what no two runs share


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sweep_script, "SECONDS", 0.0)


def swept(folder, count, **options):
    """Sweep here, to the end; the rows that were made."""
    with Store(folder) as store:
        return list(run_sweep(missing(cells(count), store), square, store, Engine(**options)))


def told(rows):
    """Rows by seed, without what no two runs share."""
    return sorted(
        ({name: value for name, value in row.items() if name not in MEASURED} for row in rows),
        key=lambda row: row["seed"],
    )


def script(folder, count, workers=1, *address):
    """The same in a process of its own, which can be killed, workers and all."""
    command = [sys.executable, str(SCRIPT), str(folder), str(count), str(workers), *address]
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}, start_new_session=True
    )


# ---- the file


def test_a_file_torn_at_any_byte_gives_back_every_whole_row_and_the_sweep_ends_as_if_nothing_had_been(tmp_path):
    rows = told(swept(tmp_path / "whole", 3))
    content = (tmp_path / "whole" / ROWS).read_bytes()
    ends = [end for end, byte in enumerate(content, start=1) if byte == 10]
    for cut in range(len(content)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / ROWS).write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        torn = cut not in (0, *ends)
        with Store(folder) as store:
            assert (len(store.rows), store.damaged) == (whole, torn)
            assert (folder / DAMAGED).exists() == torn
            made = list(run_sweep(missing(cells(3), store), square, store))
        assert len(made) == 3 - whole and told(read_rows(folder)) == rows
        assert len((folder / ROWS).read_bytes().splitlines()) == 3


def test_what_is_no_row_in_the_middle_is_set_aside_too(tmp_path):
    swept(tmp_path, 3)
    lines = (tmp_path / ROWS).read_bytes().splitlines(keepends=True)
    (tmp_path / ROWS).write_bytes(lines[0] + b"\0\0\0{]\n" + b'{"no": "key"}\n' + lines[2])
    assert len(read_rows(tmp_path)) == 2  # reading heals nothing
    with Store(tmp_path) as store:
        assert [cell["seed"] for cell in missing(cells(3), store)] == [1] and store.damaged == 2
    assert (tmp_path / DAMAGED).read_bytes() == b'\0\0\0{]\n{"no": "key"}\n'
    assert (tmp_path / ROWS).read_bytes() == lines[0] + lines[2]


def test_a_second_sweep_in_the_same_folder_is_turned_away_and_spoils_nothing(tmp_path):
    with Store(tmp_path) as store:
        store.append(row_of(square, cells(1)[0]))
        with pytest.raises(DagerError, match="another sweep"), Store(tmp_path):
            pass
        store.append(row_of(square, cells(2)[1]))
    assert len(swept(tmp_path, 4)) == 2 and len(read_rows(tmp_path)) == 4


def test_a_disk_that_fills_up_is_said_and_costs_one_row(tmp_path, monkeypatch):
    swept(tmp_path, 2)
    whole = os.write

    def fills_up(handle, line):
        """Half of a line, then nothing."""
        monkeypatch.setattr(store.os, "write", full)
        return whole(handle, line[: len(line) // 2])

    def full(handle, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "write", fills_up)
    with pytest.raises(DagerError, match="No space left on device"):
        swept(tmp_path, 5)
    monkeypatch.undo()
    assert [row["seed"] for row in read_rows(tmp_path)] == [0, 1] and len(swept(tmp_path, 5)) == 3


def test_a_folder_without_rows_says_so(tmp_path):
    with pytest.raises(DagerError, match="cannot be read"):
        read_rows(tmp_path)
    (tmp_path / ROWS).write_text("nothing\n", "utf-8")
    with pytest.raises(DagerError, match="no rows"):
        read_rows(tmp_path)


def test_errors_are_rows_and_are_done_again_only_when_asked(tmp_path):
    swept(tmp_path, 5)
    with Store(tmp_path) as store:
        assert missing(cells(5), store) == []
        again = missing(cells(5), store, retry=True)
        assert [cell["seed"] for cell in again] == [3]
        [row] = run_sweep(again, lambda cell: {"square": 9}, store)
        assert row["error"] is None
    assert len(read_rows(tmp_path)) == 5
    assert {row["seed"]: row["error"] for row in read_rows(tmp_path)} == dict.fromkeys(range(5))


def test_the_estimate_counts_by_kind():
    both = [{"model": name, "batch_size": 1, "attack": "dager", "seed": seed} for name in "ab" for seed in range(4)]
    estimate = Estimate(both)
    assert estimate.seconds() is None
    for cell, seconds in ((both[0], 2.0), (both[4], 10.0), (both[5], 20.0)):
        estimate.add({**cell, "key": key_of(cell), "seconds.cell": seconds})
    assert estimate.seconds(workers=2) == (3 * 2.0 + 2 * 15.0) / 2


# ---- kills


@pytest.mark.parametrize("workers", [1, 2])
def test_three_kills_leave_no_trace(workers, tmp_path):
    count = 80
    undisturbed = told(swept(tmp_path / "undisturbed", count))
    for _ in range(3):
        run = script(tmp_path / "killed", count, workers)
        for _ in range(9):  # some rows further on, at whatever moment that is
            assert run.stdout.readline()
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    before = len(read_rows(tmp_path / "killed"))
    assert 27 <= before < count
    out, _ = (last := script(tmp_path / "killed", count, workers)).communicate(timeout=100)
    assert last.returncode == 0 and len(out.splitlines()) == count - before  # what was missing and nothing else
    lines = [json.loads(line) for line in (tmp_path / "killed" / ROWS).read_bytes().splitlines()]
    assert told(lines) == undisturbed  # each once


def test_a_worker_that_is_killed_ends_the_sweep_with_advice_and_the_rows_so_far(tmp_path):
    with Store(tmp_path) as store, pytest.raises(DagerError, match=r"want of memory.*fewer --workers"):
        list(run_sweep(cells(40), deadly, store, Engine(workers=2)))
    seeds = [row["seed"] for row in read_rows(tmp_path)] if (tmp_path / ROWS).stat().st_size else []
    assert 5 not in seeds and len(seeds) == len(set(seeds))
    assert len(swept(tmp_path, 40, workers=2)) == 40 - len(seeds)


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers of one thread on loopback: its address, and the workers' processes."""
    pytest.importorskip("distributed")
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    place = tmp_path / "scheduler.json"

    def start(module, *arguments):
        log = (tmp_path / f"{module}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def address():
        """The scheduler opens its file before it writes it: until it is whole there is no address."""
        try:
            return json.loads(place.read_text("utf-8"))["address"]
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    processes = [start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(place))]
    try:
        wait_until(address)
        for number in range(2):
            processes.append(start("dask_worker", address(), "--nthreads", "1", "--no-nanny", "--name", str(number)))
        yield address(), processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(there, seconds=60):
    begin = time.monotonic()
    while not there():
        assert time.monotonic() < begin + seconds
        time.sleep(0.05)


def test_a_cluster_loses_and_doubles_nothing_when_one_of_two_workers_is_killed(cluster, tmp_path):
    from distributed import Client

    address, workers = cluster
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    count = 600
    run = script(tmp_path / "rows", count, 1, address)
    for _ in range(100):
        assert run.stdout.readline()
    workers[0].kill()
    run.communicate(timeout=200)
    assert run.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "rows" / ROWS).read_bytes().splitlines()]
    assert told(lines) == told(row_of(square, cell) for cell in cells(count))


def test_a_cluster_that_is_not_there_says_so(tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(DagerError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        swept(tmp_path, 1, name="dask", address="tcp://127.0.0.1:9")
