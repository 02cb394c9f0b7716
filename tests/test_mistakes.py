"""Everything that a user can get wrong at the command line is one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dager_tutorial.cli import main
from dager_tutorial.update import Update
from dager_tutorial.zoo import names


@pytest.fixture
def zoo(tiny_llama, tiny_masked_bert, monkeypatch):
    """MODEL and ENCODER load at once, other names as ever."""
    tiny, real = {"MODEL": tiny_llama, "ENCODER": tiny_masked_bert}, names.load_model
    monkeypatch.setattr(names, "load_model", lambda name, **options: tiny.get(name) or real(name, **options))


MISTAKES = {
    "no such file": ["recover", "missing.safetensors", "--model", "MODEL"],
    "missing option": ["recover", "UPDATE"],
    "no such option": ["recover", "UPDATE", "--model", "MODEL", "--batch-size", "4"],
    "no such command": ["recuperate"],
    "unknown model": ["recover", "UPDATE", "--model", "gpt7"],
    "absent": ["recover", "UPDATE", "--model", "MODEL", "--json", "absent/result.json"],
    "is a folder": ["recover", "UPDATE", "--model", "MODEL", "--json", "."],
    "absent/update": ["capture", "--model", "MODEL", "--text", "a", "--out", "absent/update.safetensors"],
    "--data": ["attack", "--model", "MODEL"],
    "either with --data": ["attack", "--model", "MODEL", "--data", "notes", "--text", "a"],
    "--label belongs to --text": ["attack", "--model", "MODEL", "--data", "notes", "--label", "1"],
    "--batch-size draws from --data": ["attack", "--model", "MODEL", "--text", "a", "--batch-size", "1"],
    "batch size 999": ["attack", "--model", "MODEL", "--data", "notes", "--batch-size", "999"],
    "--batch-size": ["bench", "decoder", "--model", "MODEL", "--data", "notes", "--batch-size", "0"],
    "use task 'masked'": ["attack", "--model", "ENCODER", "--text", "a", "--task", "next_token"],
    "bidirectional model": ["attack", "--model", "MODEL", "--text", "a", "--task", "masked"],
    "dager bench encoder": ["bench", "decoder", "--model", "ENCODER", "--data", "notes"],
    "dager bench accuracy": ["bench", "encoder", "--model", "MODEL", "--data", "notes", "--batch-size", "1"],
    "no polish": ["bench", "encoder", "--model", "ENCODER", "--data", "notes", "--batch-size", "1", "--variant", "x"],
    "--task": ["attack", "--model", "MODEL", "--text", "a", "--task", "translation"],
    "--device": ["recover", "UPDATE", "--model", "MODEL", "--device", "abacus"],
    "texts.tsv": ["attack", "--model", "MODEL", "--data", "texts.tsv"],
    "no result of dager recover": ["score", "BROKEN.json", "--model", "MODEL", "--text", "a"],
    "result.json": ["score", "result.json", "--model", "MODEL", "--text", "a"],
    "wte": ["attack", "--model", "MODEL", "--text", "a", "--share", "wte.weight"],
    "its status 'exact' is unknown (known: certified, texts_complete": [
        "score",
        "OLD.json",
        "--model",
        "MODEL",
        "--text",
        "a",
    ],
    "time_budget is 0": ["attack", "--model", "MODEL", "--text", "a", "--time-budget", "0"],
    "not valid UTF-8": ["attack", "--model", "MODEL", "--text", "caf\udce9"],
}


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line(message, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = {"status": "exact", "sequences": [[4]], "texts": ["about"], "scores": [1.0]}
    Path("OLD.json").write_text(json.dumps(old))
    Path("BROKEN.json").write_text(json.dumps({"status": "partial"}))
    Update({"layers.0.self_attn.v_proj.weight": torch.ones(32, 64)}).save("UPDATE")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == 2
    output, line = capsys.readouterr()
    assert not output
    assert line.startswith("dager: error: ") and line.count("\n") == 1 and line.endswith("\n")
    assert message.lower() in line.lower()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
