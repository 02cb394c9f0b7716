"""The sealed envelopes: that each can be opened as far as its seal says, that grades are just, and hostile input."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dager_tutorial.challenges import answers, build, registry
from dager_tutorial.challenges.grading import FALSE, FULL, Grade, grade
from dager_tutorial.challenges.seals import SLOTS, Seal, sealed
from dager_tutorial.cli import main
from dager_tutorial.errors import DagerError
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.status import Certainty, Confirmation, Status

WHOLE, ROWS, GUESS = Certainty.WHOLE, Certainty.ROWS, Certainty.GUESS
BATCH = [(5, 7), (5, 7, 9), (11,)]
ALL = [each.number for each in registry.envelopes()]
QUICK = [number for number in ALL if number != 11]  # noise takes seconds


def found_of(texts, certainties=None, status=Status.PARTIAL) -> Reconstruction:
    certainties = certainties or [WHOLE] * len(texts)
    names = tuple(map(str, texts))
    return Reconstruction(tuple(texts), names, (1.0,) * len(texts), status, tuple(map(Confirmation, certainties)))


@pytest.fixture(scope="module")
def seal() -> Seal:
    return sealed(BATCH, "whole", 3, "")


# ---- seals


def test_a_seal_holds_its_texts_and_no_changed_one(seal):
    assert all(seal.holds(text) for text in BATCH) and seal.is_whole(reversed(BATCH))
    for changed in ((5,), (7, 5), (5, 8), (57,), (5, 7, 9, 9), (1, 1), ()):
        assert not seal.holds(changed)
    assert not seal.is_whole(BATCH[:2]) and not seal.is_whole([*BATCH, (1,)])


def test_a_seal_hides_the_batch_size_and_is_never_the_same_twice(seal):
    again = sealed(BATCH, "whole", 3, "")
    assert len(seal.texts) == len(again.texts) == SLOTS and list(seal.texts) == sorted(seal.texts)
    assert not set(seal.texts) & set(again.texts) and seal.salt != again.salt and seal.batch != again.batch
    with pytest.raises(DagerError, match="too many for one envelope"):
        sealed([(token,) for token in range(SLOTS + 1)], "whole", 0, "")


# ---- grades


@pytest.mark.parametrize(
    ("texts", "certainties", "status", "points", "full"),
    [
        (BATCH, [WHOLE] * 3, Status.TEXTS_COMPLETE, 6 + FULL, True),
        (BATCH, [ROWS] * 3, Status.ROWS_COMPLETE, 6 + FULL, True),
        (BATCH, [ROWS] * 3, Status.PARTIAL, 3, False),  # rows alone claim nothing while rows are missing
        (BATCH, [WHOLE, WHOLE, GUESS], Status.PARTIAL, 5, False),
        (BATCH[:2], [WHOLE] * 2, Status.PARTIAL, 4, False),
        ([*BATCH, (6,)], [WHOLE] * 4, Status.PARTIAL, 6 + FALSE, False),
        ([*BATCH, (6,)], [WHOLE] * 3 + [GUESS], Status.PARTIAL, 6 + FULL, True),
        ([BATCH[0]] * 3, [GUESS, WHOLE, GUESS], Status.PARTIAL, 2, False),
        ([], [], Status.NOISE, 0, False),
    ],
)
def test_claims_pay_and_false_ones_cost(seal, texts, certainties, status, points, full):
    result = grade(seal, found_of(texts, certainties, status))
    assert (result.points, result.full) == (points, full)


def test_where_nothing_says_how_sure_it_is_nothing_is_claimed(seal):
    silent = Reconstruction(tuple(BATCH), ("",) * 3, (1.0,) * 3, Status.TEXTS_COMPLETE)
    assert grade(seal, silent) == Grade(0, 3, 0, 0, whole=True, cause=False, full=False)


def test_a_cause_is_asked_for_where_texts_are_missing_and_pays_there_alone(seal):
    some, every = found_of(BATCH[:1]), found_of(BATCH)
    assert grade(seal, some).wants_cause and grade(seal, some, " \n").wants_cause
    assert grade(seal, some, "noise").points == grade(seal, some).points + 1
    assert grade(seal, every, "noise").points == grade(seal, every).points


def test_full_marks_of_a_part_and_of_a_cause():
    part, none = sealed(BATCH, "part", 2, ""), sealed(BATCH, "cause", 0, "")
    two, one, nothing = found_of(BATCH[:2]), found_of(BATCH[:1]), found_of([])
    assert grade(part, two, "too many rows").full and not grade(part, two).full
    assert not grade(part, one, "too many rows").full and grade(part, found_of(BATCH)).full
    assert grade(none, nothing, "noise").full and not grade(none, nothing).full
    assert not grade(none, found_of([(1, 2)]), "noise").full


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([*BATCH, (1,), (2,), (3,)]), max_size=6), st.randoms())
def test_a_false_claim_is_never_worth_it_and_order_means_nothing(seal, texts, chance):
    before = grade(seal, found_of(texts))
    worse = grade(seal, found_of([*texts, (99,)]))
    assert worse.points <= before.points + FALSE
    chance.shuffle(texts)
    assert grade(seal, found_of(texts)) == before


@pytest.mark.parametrize("text", [(), (-1,), (2**31,), (1,) * 5000])
def test_what_is_no_text_is_refused(seal, text):
    with pytest.raises(DagerError, match=r"submit"):
        grade(seal, found_of([text]))
    with pytest.raises(DagerError, match="too many"):
        grade(seal, found_of([(token,) for token in range(101)]))


# ---- the shipped set


def test_sixteen_envelopes_are_shipped_and_small():
    assert list(range(1, 17)) == ALL
    assert sum(each.path.stat().st_size for each in registry.envelopes()) < 4_500_000
    assert [each.seal().goal for each in registry.envelopes()][:8] == ["whole"] * 8
    assert {registry.envelope(number).seal().goal for number in (10, 13, 14, 15, 16)} == {"whole"}
    assert registry.envelope(12).seal().goal == "cause"
    assert len({each.seal().salt for each in registry.envelopes()}) == 16


@pytest.mark.parametrize("number", QUICK)
def test_an_envelope_can_be_opened_as_far_as_its_seal_says(number):
    envelope = registry.envelope(number)
    update = envelope.update()
    assert tuple(sorted(update.gradients)) == tuple(sorted(envelope.share)) and update.model == envelope.name
    result = grade(envelope.seal(), attack(envelope.model(), update), "a cause")
    assert result.full and not result.false_claims
    assert result.whole or envelope.seal().goal != "whole"


def test_no_text_and_no_key_is_in_the_set():
    words = re.compile(rb"[A-Za-z]{3,} [A-Za-z]{2,} [A-Za-z]{3,}")
    for path in registry.SHIPPED.iterdir():
        if path.suffix in (".safetensors", ".json", ".sealed"):
            assert not words.search(path.read_bytes()), path.name
        assert "key" not in path.stem


def test_a_file_that_was_not_sealed_is_refused(tmp_path):
    for name in (registry.RECORDS, "seals.json"):
        (tmp_path / name).write_bytes((registry.SHIPPED / name).read_bytes())
    envelope = registry.envelope(1, tmp_path)
    with pytest.raises(DagerError, match="cannot be read"):
        envelope.update()
    envelope.path.write_bytes(registry.envelope(2).content())
    with pytest.raises(DagerError, match="not the file that was sealed"):
        envelope.update()


# ---- the instructor's set


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A set of two envelopes, with the texts and the key beside it."""
    folder = tmp_path_factory.mktemp("set")
    records = (registry.SHIPPED / registry.RECORDS).read_text("utf-8")
    (folder / registry.RECORDS).write_text(records.partition("[[envelope]]\nnumber = 3")[0], "utf-8")
    private = '[envelope.1]\ntexts = ["a cold supper"]\n[envelope.2]\ntexts = ["one", "two hats"]\nnoise = 1000.0\n'
    (folder.parent / "texts.toml").write_text(private, "utf-8")
    command = [str(folder.parent / "texts.toml"), "--key", str(folder.parent / "key"), "--set", str(folder)]
    assert build.main(command) == 0
    return folder


def test_an_instructor_builds_a_set_and_opens_it_with_the_key_alone(own, capsys):
    key = own.parent / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [each.seal().goal for each in registry.envelopes(own)] == ["whole", "cause"]
    capsys.readouterr()
    assert answers.main([str(key), "1", "--set", str(own)]) == 0
    assert json.loads(capsys.readouterr().out) == {"1": {"texts": ["a cold supper"]}}
    assert answers.main([str(key)]) == 2 and "does not open" in capsys.readouterr().err
    assert b"supper" not in b"".join(path.read_bytes() for path in own.iterdir())


@pytest.mark.parametrize(
    ("content", "said"), [("x = 1", "holds no tables"), ("[envelope.1]", "envelope.2"), ("(", "no")]
)
def test_private_texts_that_are_none_are_refused(own, tmp_path, capsys, content, said):
    (tmp_path / "texts.toml").write_text(content, "utf-8")
    before = {path: path.read_bytes() for path in own.iterdir()}
    command = [str(tmp_path / "texts.toml"), "--key", str(own.parent / "key"), "--set", str(own)]
    assert build.main(command) == 2 and said in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in own.iterdir()}


# ---- the command line


def errors(capsys) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dager: error: ")
    return lines[0]


def test_list_get_recover_submit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["challenge", "list"]) == 0 and "The quiet letter" in capsys.readouterr().out
    assert main(["challenge", "get", "1"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[0] == "dager" and main(command[1:]) == 0
    before = Path("envelope-01.json").read_bytes()
    assert main(["challenge", "submit", "1", "--json", "envelope-01.json"]) == 0
    assert f"{2 + FULL} points, full marks: the whole batch" in capsys.readouterr().out
    assert main(["challenge", "submit", "2", "--json", "envelope-01.json"]) == 0
    assert f"{FALSE} points: something that you called certain" in capsys.readouterr().out
    assert Path("envelope-01.json").read_bytes() == before


def test_an_adapter_is_handed_out_with_its_envelope(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["challenge", "get", "14"]) == main(["challenge", "get", "14"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert "--adapter" in command and main(command[1:]) == 0
    assert main(["challenge", "submit", "14", "--json", "envelope-14.json"]) == 0
    assert "full marks: the whole batch" in capsys.readouterr().out


def test_a_cause_comes_from_the_option_or_from_the_file(tmp_path, capsys):
    path = tmp_path / "found.json"
    record = {"sequences": [], "texts": [], "scores": [], "status": "noise"}
    path.write_text(json.dumps(record), "utf-8")
    assert main(["challenge", "submit", "12", "--json", str(path)]) == 0
    assert "write why" in capsys.readouterr().out
    assert main(["challenge", "submit", "12", "--json", str(path), "--cause", "noise"]) == 0
    assert "5 points, full marks" in capsys.readouterr().out
    path.write_text(json.dumps(record | {"cause": "noise"}), "utf-8")
    assert main(["challenge", "submit", "12", "--json", str(path)]) == 0
    assert "5 points, full marks" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "17", "-1", "one", "999999999999999999999"])
def test_there_is_no_such_envelope(number, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["get", "--", number], ["submit", "--json", "found.json", "--", number]):
        assert main(["challenge", *command]) == 2
        errors(capsys)
    assert list(tmp_path.iterdir()) == []


GOOD = {"sequences": [[1]], "texts": ["a"], "scores": [1], "status": "partial"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"cause": 1}',
        b'{"cause": "noise"}',
        json.dumps(GOOD | {"status": "sure"}).encode(),
        json.dumps(GOOD | {"sequences": [["1"]]}).encode(),
        json.dumps(GOOD | {"sequences": [[-1]]}).encode(),
        json.dumps(GOOD | {"sequences": [[10**30]]}).encode(),
        json.dumps(GOOD | {"texts": []}).encode(),
        json.dumps(
            {name: GOOD[name] * 101 for name in ("sequences", "texts", "scores")} | {"status": "noise"}
        ).encode(),
        json.dumps(GOOD | {"confirmations": [{"certainty": "very"}]}).encode(),
        b" " * 4_000_001,
    ],
    ids=range(16),
)
def test_what_is_no_result_is_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "found.json"
    path.write_bytes(content)
    assert main(["challenge", "submit", "1", "--json", str(path)]) == 2
    errors(capsys)
    assert path.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none.json"):
        assert main(["challenge", "submit", "1", "--json", str(path)]) == 2
        errors(capsys)


def test_get_overwrites_no_folder_that_is_another(tmp_path, capsys):
    (tmp_path / "mine-model").mkdir()
    (tmp_path / "mine-model" / "weights").write_text("dear", "utf-8")
    for out in ("mine.safetensors", "none/there.safetensors", "mine-model"):
        assert main(["challenge", "get", "1", "--out", str(tmp_path / out)]) == 2
        errors(capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine-model", "weights"]


@pytest.mark.parametrize(
    "content", [None, "", "envelope = 3", "[[envelope]]\nnumber = 1", "models = 1\nenvelope = [1]"]
)
def test_a_folder_that_is_no_set_is_refused(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / registry.RECORDS).write_text(content, "utf-8")
    assert main(["challenge", "list", "--set", str(tmp_path)]) == 2
    errors(capsys)
