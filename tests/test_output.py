"""Files of the command line: hostile places are refused before any work, nothing is lost, results are read back."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
from itertools import product
from pathlib import Path

import pytest

from dager_tutorial.cli import main
from dager_tutorial.cli.output import read_result, writable, write_json, write_text
from dager_tutorial.errors import DagerError
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Certainty, Confirmation, Status

COMMANDS = {
    "--out": ["capture", "--model", "any", "--text", "a", "--out"],
    "--svg": ["demo", "--svg"],
    "--json": ["attack", "--model", "any", "--text", "a", "--json"],
}
RESULT = {"status": "partial", "sequences": [[4, 5]], "texts": ["a about"], "scores": [1.0]}


def a_fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def a_socket(folder):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(folder / "socket"))
    return folder / "socket"


def a_link_to_a_device(folder):
    (folder / "link").symlink_to("/dev/null")
    return folder / "link"


def a_link_to_a_link_to_a_device(folder):
    (folder / "second").symlink_to(a_link_to_a_device(folder))
    return folder / "second"


def a_link_to_itself(folder):
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def a_file_as_a_folder(folder):
    (folder / "file").write_text("kept")
    return folder / "file" / "result"


HOSTILE = {
    "no regular file": (lambda _: Path(os.devnull), a_fifo, a_socket, a_link_to_a_device, a_link_to_a_link_to_a_device),
    "is a folder": (lambda folder: folder,),
    "does not exist": (lambda folder: folder / "absent" / "result",),
    "cannot be written": (a_link_to_itself, a_file_as_a_folder, lambda folder: folder / ("x" * 300)),
}


def seen(folder):
    """What stands in a folder: name, kind and device of each entry, links not followed."""
    return {entry.name: (entry.lstat().st_mode, entry.lstat().st_rdev) for entry in folder.iterdir()}


@pytest.mark.parametrize("option", COMMANDS)
@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, all in HOSTILE.items() for make in all])
def test_a_hostile_place_is_refused_before_any_work(option, reason, make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: pytest.fail("worked in vain"))
    path = make(tmp_path)
    before, device = seen(tmp_path), Path(os.devnull).stat()
    assert main([*COMMANDS[option], str(path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"dager: error: {path}: ") and reason in line and line.count("\n") == 1
    assert seen(tmp_path) == before
    after = Path(os.devnull).stat()
    assert stat.S_ISCHR(after.st_mode) and after.st_ino == device.st_ino


@pytest.mark.parametrize(("exists", "closed"), [(False, "folder"), (True, "folder"), (True, "file")])
def test_what_may_not_be_written_is_refused(exists, closed, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    if exists:
        path.write_text("kept")
    denied = {"folder": tmp_path, "file": path}[closed]
    monkeypatch.setattr(os, "access", lambda asked, mode: not (Path(asked) == denied and mode & os.W_OK))
    with pytest.raises(DagerError, match="may not be written"):
        writable(path)
    monkeypatch.undo()
    assert writable(path) == path and writable(None) is None


def test_a_file_is_replaced_and_never_written_in_place(tmp_path):
    path = tmp_path / "result"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert (reader.read(), path.read_text()) == ("old", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_a_full_disk_leaves_the_older_result_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "result"
    path.write_text("old")
    real = Path.write_bytes

    def half(self, content):
        real(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(DagerError, match=r"result: cannot be written \(No space left on device\)"):
        write_text(path, "new")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_a_link_and_its_target_is_written(dangling, tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    link.symlink_to(target)
    if not dangling:
        target.write_text("old")
    write_text(writable(link), "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_json_holds_any_text_and_one_key_a_line(tmp_path):
    path = tmp_path / "record.json"
    record = {"update": os.fsdecode(b"\xff.safetensors"), "texts": ["né\n", '"'], "scores": [None, 1.5], "empty": {}}
    write_json(path, record)
    assert json.loads(path.read_text("utf-8")) == record
    assert [line.split(":")[0].strip() for line in path.read_text("utf-8").splitlines()[1:-1]] == [
        json.dumps(key) for key in record
    ]


@pytest.mark.parametrize(("status", "certainty"), list(product(Status, [None, *Certainty])))
def test_what_recover_writes_is_read_back(status, certainty, tmp_path):
    confirmations = () if certainty is None else (Confirmation(certainty), Confirmation(Certainty.GUESS))
    found = Reconstruction(((4, 5), (0,)), ("a about", "né"), (1.25, math.inf), status, confirmations, "said")
    path = tmp_path / "result.json"
    write_json(path, found.to_json())
    back = read_result(path)
    assert (back.sequences, back.texts, back.status) == (found.sequences, found.texts, status)
    assert back.confirmations == confirmations
    assert back.scores[0] == 1.25 and math.isnan(back.scores[1])


def test_confirmations_may_be_missing(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    assert read_result(path).confirmations == ()


@pytest.mark.parametrize(
    "change",
    [
        {"sequences": [[4], [5]]},
        {"sequences": 4},
        {"sequences": [["four"]]},
        {"sequences": ["45"]},
        {"sequences": [[4.5]]},
        {"sequences": [[math.inf]]},
        {"scores": ["good"]},
        {"scores": [10**400]},
        {"texts": None},
        {"status": ["partial"]},
        {"confirmations": 3},
        {"confirmations": [{}]},
        {"confirmations": [{"certainty": "sure"}]},
        {"confirmations": [{"certainty": "whole"}] * 2},
    ],
    ids=str,
)
def test_a_broken_result_is_refused(change, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT | change))
    with pytest.raises(DagerError, match=r"result\.json: is no result of dager recover --json"):
        read_result(path)


@pytest.mark.parametrize("name", ["exact", "splendid", "", None, 3])
def test_an_unknown_status_is_named_with_those_that_are_known(name, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT | {"status": name}))
    with pytest.raises(DagerError, match=r"result\.json: its status .* is unknown") as caught:
        read_result(path)
    assert repr(str(name)) in str(caught.value) and all(status.value in str(caught.value) for status in Status)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"1e999", b"9" * 5000])
def test_a_file_that_is_no_result_is_refused(content, tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(DagerError, match=r"result\.json"):
        read_result(path)
