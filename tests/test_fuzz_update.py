"""A thousand broken update files: each is refused in one line or gives a valid result."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.stopwatch import peak_memory_mb
from dager_tutorial.update import KINDS, Update

MUTATIONS = 1000
NUMBERS = [0, 1, 2, -1, 7, 63, 64, 65, 4096, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 0.5]
STRINGS = [
    "",
    "\0",
    "\n",
    "../../etc/passwd",
    "__metadata__",
    "h.0",
    "é" * 300,
    "\x1b[2J",
    "{}",
    "%s%n",
    "nan",
]
DTYPES = [
    "F16",
    "BF16",
    "F32",
    "F64",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "I8",
    "I64",
    "U64",
    "BOOL",
    "C64",
    "f32",
]
METADATA = {
    "kind": [*KINDS, "", "GRADIENT", "weights", 1, None, ["delta"]],
    "learning_rate": [
        "0.1",
        "1e-9",
        "0",
        "-1",
        "nan",
        "inf",
        "1e999",
        "",
        "0x10",
        "1_0",
        "9" * 5000,
        0.1,
        None,
    ],
    "model": ["gpt2", "", "\n", "\x1b[2J", "é" * 5000, "../..", 3, None],
    "format": ["pt", "np", ""],
}

Header = dict[str, Any]


def _split(raw: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _join(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip_bits(raw: bytes, chance: random.Random) -> bytes:
    """In the length and the JSON as often as in the numbers."""
    raw, area = bytearray(raw), chance.choice([8, 400, len(raw)])
    for _ in range(chance.choice([1, 2, 8, 64])):
        raw[chance.randrange(area)] ^= 1 << chance.randrange(8)
    return bytes(raw)


def cut(raw: bytes, chance: random.Random) -> bytes:
    """Truncate, extend, drop or repeat a part."""
    start, end = sorted(chance.choices(range(chance.choice([12, 500, len(raw)])), k=2))
    tail = bytes(chance.randrange(1, 100))
    return chance.choice([raw[:end], raw[start:], raw[:start] + raw[end:], raw[:end] + raw[start:], raw + tail])


def lie_about_length(raw: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    lie = chance.choice([length + chance.randint(-9, 9), chance.getrandbits(chance.randint(1, 64)), 2**63, 10**8])
    return (lie % 2**64).to_bytes(8, "little") + raw[8:]


def edit_tensor(raw: bytes, chance: random.Random) -> bytes:
    """A tensor's dtype, shape, offsets or place in the header."""
    header, data = _split(raw)
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    field = chance.choice(["dtype", "shape", "data_offsets", "missing", "extra", "whole"])
    if field == "dtype":
        entry["dtype"] = chance.choice([*DTYPES, *STRINGS, *NUMBERS, None, []])
    elif field in ("shape", "data_offsets"):
        entry[field][chance.randrange(len(entry[field]))] = chance.choice(NUMBERS)
        if chance.random() < 0.3:
            entry[field] = chance.choice([[], None, entry[field] * 2, [1] * 3000, entry[field][::-1], {"a": 1}])
    elif field == "missing":
        del entry[chance.choice(list(entry))]
    elif field == "extra":
        entry[chance.choice(STRINGS)] = chance.choice([*NUMBERS, *STRINGS])
    else:
        header[name] = chance.choice([None, [], "x", 3, {}, {name: entry}])
    return _join(header, data)


def rename(raw: bytes, chance: random.Random) -> bytes:
    """Names that a backbone has not, has already, or that no file should hold."""
    header, data = _split(raw)
    old = chance.choice([key for key in header if key != "__metadata__"])
    names = [
        *STRINGS,
        "score.weight",
        "h.9.x",
        "transformer." * 50,
        "lm_head",
        old.upper(),
        "transformer",
        f"{old}.x",
    ]
    new = chance.choice([*names, old.removeprefix("transformer."), chance.choice(list(header)), "n" * 10**6])
    entry = header.pop(old)
    header[new] = entry
    return _join(header, data)


def edit_metadata(raw: bytes, chance: random.Random) -> bytes:
    header, data = _split(raw)
    key = chance.choice(list(METADATA))
    header["__metadata__"][key] = chance.choice(METADATA[key])
    if chance.random() < 0.2:
        header["__metadata__"] = chance.choice([None, [], "x", 1, {}, {"a": {"b": "c"}}, {"k" * 10**5: "v"}])
    return _join(header, data)


def break_json(raw: bytes, chance: random.Random) -> bytes:
    """Deep nesting, no JSON, other encodings, repeated keys, padding."""
    header, data = _split(raw)
    text = json.dumps(header).encode()
    depth = chance.choice([10, 200, 10**5])
    lone_surrogate = text.replace(b"transformer", b"\\ud800", 1)
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    first = json.dumps(dict(list(header.items())[:2])).encode()
    twice = first[:-1] + b"," + text[1:]
    texts = [
        b"[" * depth,
        nested,
        b"{" + nested[1:],
        b"null",
        b"[]",
        b'{"a":1e999}',
        text.decode().encode("utf-16"),
    ]
    return _join(chance.choice([*texts, lone_surrogate, twice, text[:-1], text + b" " * depth, b"\xff" + text]), data)


def change_numbers(raw: bytes, chance: random.Random) -> bytes:
    """Any bytes at all as tensor data, NaN and infinity among them."""
    header, data = _split(raw)
    data, size = bytearray(data), chance.choice([2, 4, 1000])
    start = chance.randrange(len(data) - size)
    data[start : start + size] = chance.choice([chance.randbytes(size), b"\xff" * size, b"\0\0\x80\x7f" * (size // 4)])
    return _join(header, bytes(data))


MUTATORS: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bits,
    cut,
    lie_about_length,
    edit_tensor,
    rename,
    edit_metadata,
    break_json,
    change_numbers,
]


@pytest.fixture(scope="module")
def valid_file(tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "update.safetensors"
    names = [f"transformer.h.{block}.attn.c_attn.{leaf}" for block in (0, 1) for leaf in ("weight", "bias")]
    share = [*names, "transformer.ln_f.bias", "score.weight"]
    update = client_update(tiny_gpt2, ["the dog is good"], config=ClientConfig(share=share))
    Update(update.gradients, "delta", 0.1, "tiny-gpt2").save(path)
    return path.read_bytes()


def is_sound(update: Update, model: LanguageModel) -> bool:
    """What every later stage relies on."""
    own = dict(model.network.named_parameters())
    gradients = update.for_backbone(model.network)
    fits = all(own[name].shape == tensor.shape for name, tensor in gradients.items())
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in update.gradients.values())
    return bool(gradients) and fits and finite and update.kind in KINDS


def test_a_thousand_mutated_files(valid_file: bytes, tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    before = peak_memory_mb()
    refused, accepted = set(), 0
    for seed in range(MUTATIONS):
        chance = random.Random(seed)
        path.write_bytes(MUTATORS[seed % len(MUTATORS)](valid_file, chance))
        try:
            update = Update.load(path)
            assert is_sound(update, tiny_gpt2), seed
            accepted += 1
        except DagerError as error:
            message = str(error)
            assert message.isprintable(), seed
            assert 0 < len(message) < 1000, seed
            refused.add(message.split(": ", 1)[-1][:25])
    assert peak_memory_mb() - before < 300
    assert accepted > MUTATIONS / 20  # the mutations reach past the parser,
    assert len(refused) > 12  # and meet many different checks
