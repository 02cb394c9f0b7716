"""Ctrl-C while the attack runs: what was found so far is reported; once more, and the program ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dager_tutorial.cli.progress import stoppable
from dager_tutorial.models.language_model import LanguageModel

# A run that asks itself to stop when its search has begun, as a user would.
SCRIPT = """
import os, signal, sys
name, result = sys.argv[1:]
from dager_tutorial.server.decoder.search import TreeSearch
from dager_tutorial.cli import main
grow, steps = TreeSearch._step, []
def step(self, *arguments):
    steps.append(1)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return grow(self, *arguments)
TreeSearch._step = step
sys.argv = ["dager", "attack", "--model", name, "--text", "the dog is good and we want more"]
sys.argv += ["--json", result]
sys.exit(main())
"""


def test_ctrl_c_reports_what_was_found(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    for part in (tiny_gpt2.network, tiny_gpt2.tokenizer):
        part.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "stopping with what was found so far" in done.stderr
    found = json.loads(result.read_text("utf-8"))
    assert found["status"] == "out_of_time" and len(found["sequences"]) == 1
    assert 1 <= len(found["sequences"][0]) < 8


@pytest.fixture
def listening() -> Iterator[None]:
    """A process that was started in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_the_second_ends_the_program_and_the_handler_is_put_back() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_cannot_listen_and_run_all_the_same() -> None:
    seen: list[bool] = []

    def run() -> None:
        with stoppable() as asked:
            seen.append(asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
