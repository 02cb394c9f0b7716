"""Low-rank adapters: what their gradients span, whole texts recovered from them, and the files that peft writes."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import WORDS, assert_exact, every, truth

from dager_tutorial.client.adapters import LoraConfig, hand_out
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError, ModelError, UpdateError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV, QUERY
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.inspection import inspect_update
from dager_tutorial.status import Status
from dager_tutorial.update import Update
from dager_tutorial.zoo.adapters import load_adapter

TEXTS = ["we listen to the old river", "my father never knew her", "cup young snow"]
PUBLIC = [" ".join(WORDS[start : start + 5]) for start in range(0, 200, 5)]
MAPS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


def handed_out(model, rank=48, targets=None, **options):
    targets = targets or MAPS[model.network.config.model_type]
    return hand_out(model, LoraConfig(rank=rank, targets=targets, **options), texts=PUBLIC)


@every("tiny_gpt2", "tiny_llama")
def test_a_fresh_adapter_spans_the_projected_inputs_and_only_its_b_speaks(model):
    known = handed_out(model)
    update = client_update(known, TEXTS)
    assert all(not tensor.any() for name, tensor in update.gradients.items() if "lora_A" in name)
    assert any(tensor.any() for name, tensor in update.gradients.items() if "lora_B" in name)
    evidence = evidence_of(known, update)
    tap = evidence.adapter.tap(1, QKV)
    span = evidence.span(tap)
    assert span.projection is not None and span.width == 48
    rows = inputs_of(known, TEXTS, tap)
    assert span.holds(rows).all()
    assert not span.holds(inputs_of(known, ["snow river old the to listen"], tap)[1:]).any()
    assert span.rank == torch.linalg.matrix_rank(rows.double() @ span.projection.T, rtol=1e-5)


def inputs_of(model, texts, tap):
    """The vectors that enter a tap, of whole texts without pads."""
    found = []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        found.append(adapter_for(model.network).tap_inputs(ids, torch.ones_like(ids), [tap])[tap][0])
    return torch.cat(found)


@every("tiny_gpt2", "tiny_llama")
@pytest.mark.parametrize("options", [{}, {"init": "gaussian"}, {"steps": 2}, {"init": "pissa"}])
def test_texts_come_back_from_an_adapter_alone(model, options):
    known = handed_out(model, **options)
    found = attack(known, client_update(known, TEXTS), config=AttackConfig(complete=True))
    assert_exact(found, truth(model, TEXTS), Status.ROWS_COMPLETE)


def test_a_map_that_is_full_does_not_hide_what_those_beside_it_say(tiny_llama):
    known = handed_out(tiny_llama, rank=12, targets="all-linear", steps=2)
    update, adapter = client_update(known, TEXTS), adapter_for(tiny_llama.network)
    assert evidence_of(known, update).span(adapter.tap(0, ATTENTION_OUTPUT)).saturated
    assert_exact(attack(known, update), truth(tiny_llama, TEXTS), Status.TEXTS_COMPLETE)


def test_only_a_trained_adapter_gives_the_inputs_themselves(tiny_llama):
    for options, projected in ({}, True), ({"steps": 2}, False), ({"init": "olora"}, False):
        known = handed_out(tiny_llama, **options)
        span = evidence_of(known, client_update(known, TEXTS)).span(adapter_for(known.network).tap(1, QKV))
        assert (span.projection is not None) is projected
        assert span.rank == len(
            {tuple(ids[:end]) for ids in truth(tiny_llama, TEXTS) for end in range(1, len(ids) + 1)}
        )


def test_a_narrow_adapter_is_called_full_with_the_numbers_and_confirms_nothing(tiny_gpt2):
    known = handed_out(tiny_gpt2, rank=4)
    found = attack(known, client_update(known, TEXTS))
    assert found.status in (Status.SATURATED,)
    assert not set(found.confirmed) - truth(tiny_gpt2, TEXTS)
    assert "of the 4 directions" in found.diagnosis
    rows = inspect_update(known, client_update(known, TEXTS)).rows
    assert {row.tap.kind for row in rows} == {QKV} and rows[0].saturated and rows[0].shape[1] == 4


def test_queries_alone_hold_no_first_token_and_that_is_said(tiny_llama):
    known = handed_out(tiny_llama, targets=["q_proj"])
    update = client_update(known, TEXTS)
    evidence = evidence_of(known, update)
    beginnings = inputs_of(known, ["we", "my", "cup"], evidence.adapter.tap(1, QUERY))
    assert not evidence.span(evidence.adapter.tap(1, QKV)).holds(beginnings).any()
    found = attack(known, update)
    assert found.status is Status.PARTIAL and "first token" in found.diagnosis and not found.sequences


def test_peft_files_make_the_round_trip_and_need_no_peft_to_be_read(tiny_gpt2, tmp_path, monkeypatch):
    known = hand_out(tiny_gpt2, LoraConfig(rank=48, targets=["c_attn"], steps=1), texts=PUBLIC, folder=tmp_path)
    path = tmp_path / "update.safetensors"
    client_update(known, TEXTS).save(path)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    read = load_adapter(tiny_gpt2, tmp_path)
    for name, parameter in known.network.named_parameters():
        torch.testing.assert_close(read.network.get_parameter(name), parameter)
    assert_exact(attack(read, Update.load(path)), truth(tiny_gpt2, TEXTS), Status.ROWS_COMPLETE)
    with pytest.raises(DagerError, match="pip install"):
        client_update(read, TEXTS)


def test_the_base_model_is_left_alone_and_names_are_those_of_peft(tiny_llama):
    before = {name: tensor.clone() for name, tensor in tiny_llama.network.named_parameters()}
    known = handed_out(tiny_llama, init="pissa")
    update = client_update(known, TEXTS, config=ClientConfig(share=["*lora_B*"]))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.network.named_parameters())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert name in update.gradients and all("lora_B" in each for each in update.gradients)
    assert not any(parameter.requires_grad for parameter in known.network.parameters())


def test_what_does_not_fit_is_refused_in_one_line(tiny_gpt2, tiny_llama, tmp_path):
    known = hand_out(tiny_gpt2, LoraConfig(rank=6, targets=["c_attn"]), folder=tmp_path)
    update = client_update(known, TEXTS)
    with pytest.raises(UpdateError, match="give the adapter"):
        attack(tiny_gpt2, update)
    with pytest.raises(UpdateError, match="shape"):
        attack(handed_out(tiny_gpt2, rank=7), update)
    with pytest.raises(UpdateError, match="no map"):
        attack(handed_out(tiny_llama), update)
    with pytest.raises(ModelError, match="base model"):
        load_adapter(tiny_llama, tmp_path)
    with pytest.raises(ModelError, match="another initialisation"):  # peft's olora takes no Conv1D
        handed_out(tiny_gpt2, init="olora")
    with pytest.raises(DagerError, match="texts"):
        hand_out(tiny_gpt2, LoraConfig(steps=1))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    refused = [({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3"), ({"init_lora_weights": "pissa"}, "pissa")]
    for change, said in refused:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=said):
            load_adapter(tiny_gpt2, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ModelError, match="pickled"):
        load_adapter(tiny_gpt2, tmp_path)
