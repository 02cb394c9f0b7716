"""The update record and its file: round trips, names of every client, and one clear line for each fault."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import every
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update

TEXTS = ["the dog is good", "a cat"]
MODELS = ["tiny_gpt2", "tiny_llama", "tiny_bert"]
ONE = {"h.0.attn.c_attn.weight": torch.ones(2, 3)}


every_model = every(*MODELS)


def header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, dtype: str, tiny_gpt2: LanguageModel) -> None:
    update = client_update(tiny_gpt2, TEXTS, config=ClientConfig(dtype=dtype))
    update = Update(update.gradients, kind="delta", learning_rate=1e-3 / 3, model="tiny-gpt2")
    update.save(tmp_path / "update.safetensors")
    loaded = Update.load(tmp_path / "update.safetensors")
    assert (loaded.kind, loaded.learning_rate, loaded.model) == ("delta", 1e-3 / 3, "tiny-gpt2")
    assert loaded.gradients.keys() == update.gradients.keys()
    for name, tensor in update.gradients.items():
        assert torch.equal(loaded.gradients[name], tensor)
        assert loaded.gradients[name].dtype == tensor.dtype


def test_a_file_without_metadata_is_a_gradient(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "plain.safetensors")
    loaded = Update.load(tmp_path / "plain.safetensors")
    assert (loaded.kind, loaded.learning_rate, loaded.model) == ("gradient", None, None)


def test_views_and_tied_gradients_can_be_saved(tmp_path: Path) -> None:
    """Distributed training keeps gradients as views of one buffer; safetensors alone refuses those."""
    buffer = torch.arange(12.0)
    gradients = {"a": buffer[:6].view(2, 3), "b": buffer[6:].view(3, 2).T, "c": buffer[:6].view(2, 3)}
    Update(gradients).save(tmp_path / "views.safetensors")
    loaded = Update.load(tmp_path / "views.safetensors").gradients
    assert all(torch.equal(loaded[name], tensor) for name, tensor in gradients.items())


def test_a_file_can_be_saved_over_itself_and_a_failed_save_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    Update(ONE).save(path)
    loaded = Update.load(path)
    loaded.save(path)
    assert torch.equal(Update.load(path).gradients["h.0.attn.c_attn.weight"], torch.ones(2, 3))
    with pytest.raises(UpdateError, match=r"missing.*does not exist; create it"):
        loaded.save(tmp_path / "missing" / "update.safetensors")
    with pytest.raises(UpdateError, match="is a folder"):
        loaded.save(tmp_path)
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(UpdateError, match="no regular file"):
        loaded.save(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["link", "update.safetensors"]  # noqa: PTH208 - hidden leftovers count


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"12345", "not a safetensors file"),
        (pickle.dumps(ONE), "not a safetensors file: only safetensors is read (pickled"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "truncated"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)), "truncated"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)), "truncated"),
        (
            header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
            "not a valid safetensors",
        ),
        (header({}), "the update has no tensors"),
        (header({"__metadata__": {"kind": "gradient"}}), "the update has no tensors"),
        (
            header({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
            "tensor 'a' is I64",
        ),
        (
            header({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
            "tensor 'a' is F8_E4M3",
        ),
        (header({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "tensor 'a' has no elements"),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0\0\x80\x7f"),
            "tensor 'a' holds NaN or infinity",
        ),
        (
            header({"a\n": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"\xc0\x7f"),
            "tensor 'a\\n' holds NaN or infinity",
        ),
        (
            header({"__metadata__": {"kind": "weights"}}),
            "kind is 'weights': it must be 'gradient' or 'delta'",
        ),
        (
            header({"__metadata__": {"learning_rate": "fast"}}),
            "learning_rate is 'fast': it must be a positive",
        ),
        (header({"__metadata__": {"kind": 1}}), "not a valid safetensors"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "update.safetensors"
    path.write_bytes(content)
    with pytest.raises(UpdateError) as caught:
        Update.load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"'{path}'")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="no such file"):
        Update.load(tmp_path / "none.safetensors")
    with pytest.raises(UpdateError, match="not a file"):
        Update.load(tmp_path)
    with pytest.raises(UpdateError, match=r"nul\\x00byte"):
        Update.load(tmp_path / "nul\0byte")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UpdateError, match="not a file"):  # opening it would wait for ever
        Update.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradients": {}}, "no tensors"),
        ({"gradients": {"a": torch.ones(2, dtype=torch.int64)}}, r"tensor 'a' is torch.int64"),
        ({"gradients": {"a": [1.0]}}, "tensor 'a' is list"),
        ({"gradients": {"a": torch.tensor([1.0, float("-inf")])}}, "tensor 'a' holds NaN or infinity"),
        ({"kind": "weights"}, "kind is 'weights'"),
        ({"learning_rate": 0.0}, "learning_rate is '0.0'"),
        ({"learning_rate": float("nan")}, "learning_rate is 'nan'"),
        ({"model": "gpt2\x1b[2J"}, "control characters"),
    ],
)
def test_a_record_is_checked_when_made(fields: dict, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        Update(**{"gradients": ONE, **fields})


@every_model
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("headed", [True, False])
def test_every_client_s_names_become_the_backbone_s(model: LanguageModel, prefixed: bool, headed: bool) -> None:
    update = client_update(model, TEXTS)
    prefix = f"{model.network.base_model_prefix}."
    kept = {name: tensor for name, tensor in update.gradients.items() if headed or name.startswith(prefix)}
    named = kept if prefixed else {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
    found = Update(named).for_backbone(model.network)
    assert list(found) == [name for name, _ in model.network.named_parameters()]
    assert all(tensor is update.gradients[prefix + name] for name, tensor in found.items())


@every_model
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_all_names_of_transformers_classes_are_understood(model: LanguageModel, auto: type) -> None:
    """Every parameter of every client is either the backbone's own or of a head."""
    client = auto.from_config(model.network.config)
    named = {name: parameter.detach() for name, parameter in client.named_parameters()}
    found = Update(named).for_backbone(model.network)
    own = dict(model.network.named_parameters())
    assert found.keys() <= own.keys()
    assert len(found) >= len(own) - 2  # BERT's causal class has no pooler
    assert len(named) - len(found) <= 7


@every_model
def test_partly_shared_is_fine(model: LanguageModel) -> None:
    update = client_update(model, TEXTS, config=ClientConfig(share="attention"))
    assert len(update.for_backbone(model.network)) == len(update.gradients)


@every_model
def test_names_and_shapes_that_do_not_fit_are_named(model: LanguageModel, request: pytest.FixtureRequest) -> None:
    update = client_update(model, TEXTS)
    name = next(n for n in update.gradients if n.startswith(model.network.base_model_prefix) and n.endswith("weight"))
    own = name.removeprefix(f"{model.network.base_model_prefix}.")
    tensor = update.gradients[name]
    faults = {
        "has shape": {name: tensor[:-1]},
        "is no parameter of the": {name: tensor, f"{name}s": tensor},
        f"nearest: '{own}'": {name: tensor, f"{own}s": tensor},
        "with and without its prefix": {name: tensor, own: tensor},
        "no tensor of the update belongs to the": {"score.weight": tensor},
    }
    for message, gradients in faults.items():
        with pytest.raises(UpdateError, match=message) as caught:
            Update(gradients).for_backbone(model.network)
        assert "name the model that the client used" in str(caught.value) or "keep one" in str(caught.value)
    for other in MODELS:
        if other != request.node.callspec.params["model"]:
            with pytest.raises(UpdateError, match=r"no tensor of the update belongs .* names the model 'tiny"):
                update.for_backbone(request.getfixturevalue(other).network)


def test_messages_quote_strangers_text() -> None:
    assert quote("a\nb\x1b[0m\u202e") == r"'a\nb\x1b[0m\u202e'"
    assert len(quote("x" * 10**6)) < 130
    assert issubclass(UpdateError, DagerError)
