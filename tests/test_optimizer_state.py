"""An optimiser's state as an update: Adam's first moment is a gradient, and a file that would run code is not read."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace

import pytest
import torch
from helpers import assert_exact, every, truth
from transformers.trainer_pt_utils import get_parameter_names

from dager_tutorial.cli import main
from dager_tutorial.client.federated import LocalTraining, local_update
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import UpdateError
from dager_tutorial.models.heads import Head, with_head
from dager_tutorial.optimizer_state import update_of_state
from dager_tutorial.server.attack import attack
from dager_tutorial.server.embedding_rows import named_tokens
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.inspection import inspect_update
from dager_tutorial.status import Status
from dager_tutorial.zoo.checkpoint import save_checkpoint

BATCHES = [["we listen to the old river", "my father never knew her"], ["cup young snow", "the river knew"]]
ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD


def trained(model, folder, kind=ADAMW, *, grouped=True, task="classification", **options):
    """Train on each batch in turn; the models that each step began with, and the folders it left."""
    network = copy.deepcopy(model.network)
    client = with_head(network, model.tokenizer, Head(task)).requires_grad_(True)
    client.config.pad_token_id = 0
    optimizer = kind(_groups(client) if grouped else client.parameters(), **({"lr": 1e-3} | options))
    models, folders = [], []
    for index, texts in enumerate(BATCHES):
        models.append(replace(model, network=copy.deepcopy(network).requires_grad_(False)))
        gradients = client_update(models[-1], texts).gradients
        for name, parameter in client.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
        folders.append(folder / f"checkpoint-{index + 1}")
        folders[-1].mkdir()
        torch.save(optimizer.state_dict(), folders[-1] / "optimizer.pt")
    return models, folders


def _groups(client):
    """As transformers' Trainer makes them."""
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(client, [torch.nn.LayerNorm], patterns))
    inside = [parameter for name, parameter in client.named_parameters() if name in decayed]
    outside = [parameter for name, parameter in client.named_parameters() if name not in decayed]
    return [{"params": inside, "weight_decay": 0.1}, {"params": outside, "weight_decay": 0.0}]


def assert_gradient(update, model, texts):
    """The update is the gradient of these texts, under its names."""
    wanted = client_update(model, texts).gradients
    assert update.gradients.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (update.gradients[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-9, name


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
@pytest.mark.parametrize("grouped", [True, False])
def test_the_first_moment_is_the_gradient_of_each_step(model, tmp_path, grouped):
    models, (first, second) = trained(model, tmp_path, grouped=grouped)
    assert_gradient(update_of_state(models[0], first), models[0], BATCHES[0])
    assert_gradient(update_of_state(models[1], second, before=first / "optimizer.pt"), models[1], BATCHES[1])


def test_momentum_of_sgd_is_the_same(tiny_gpt2, tmp_path):
    models, (first, second) = trained(tiny_gpt2, tmp_path, SGD, momentum=0.9, grouped=False)
    assert_gradient(update_of_state(models[0], first), models[0], BATCHES[0])
    assert_gradient(update_of_state(models[1], second, before=first), models[1], BATCHES[1])


@every("tiny_gpt2", "tiny_llama")
def test_texts_come_back_from_the_state_after_each_step(model, tmp_path):
    models, (first, second) = trained(model, tmp_path)
    assert_exact(attack(models[0], update_of_state(models[0], first)), truth(model, BATCHES[0]), Status.CERTIFIED)
    assert_exact(
        attack(models[1], update_of_state(models[1], second, before=first)), truth(model, BATCHES[1]), Status.CERTIFIED
    )


def test_a_weight_difference_of_the_same_step_is_full_of_signs(tiny_gpt2, tmp_path):
    models, (first, _) = trained(tiny_gpt2, tmp_path)
    name = "h.1.attn.c_attn.weight"
    delta = models[1].network.get_parameter(name) - models[0].network.get_parameter(name)
    moment = update_of_state(models[0], first).gradients[f"transformer.{name}"]
    rows = sum(len(tiny_gpt2.tokenizer(text)["input_ids"]) for text in BATCHES[0])
    assert torch.linalg.matrix_rank(moment, rtol=1e-5) == rows
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == min(delta.shape)


@every("tiny_gpt2", "tiny_llama")
def test_signs_are_named_and_the_tokens_that_the_embedding_names_are_told_apart_from_weight_decay(model):
    training = LocalTraining(1, 4, 1e-4, "adamw")
    update = local_update(model, BATCHES[0], training=training)
    assert update.for_backbone(model.network)[_table(model)].any(1).all()  # weight decay moves every row
    tokens = {token for ids in truth(model, BATCHES[0]) for token in ids}
    assert set(named_tokens(evidence_of(model, update)).tolist()) == tokens
    said = f"signs are left, and their rank is full; the rows of the embedding that moved name {len(tokens)} tokens"
    assert said in inspect_update(model, update).verdict
    found = attack(model, update)
    assert said in found.diagnosis and not set(found.confirmed) - truth(model, BATCHES[0])
    assert {token for ids in found.sequences for token in ids} <= tokens
    by_sgd = local_update(model, BATCHES[0], training=replace(training, optimizer="sgd"))
    assert "signs" not in inspect_update(model, by_sgd).verdict


def _table(model):
    table = model.network.get_input_embeddings().weight
    return next(name for name, each in model.network.named_parameters() if each is table)


def test_the_command_line_reads_a_checkpoint_folder(tiny_gpt2, tmp_path, capsys):
    models, (first, second) = trained(tiny_gpt2, tmp_path)
    (tmp_path / "base").mkdir()
    save_checkpoint(models[1].network, tiny_gpt2.tokenizer, tmp_path / "base")
    arguments = [str(second), "--model", str(tmp_path / "base"), "--before", str(first)]
    assert main(["recover", *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in BATCHES[1])
    assert main(["inspect", *arguments]) == 0
    assert "exposed" in capsys.readouterr().out


class Harmful:
    """What a pickle can do: call anything."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_file_that_would_run_code_is_refused_by_name_and_not_run(tiny_gpt2, tmp_path):
    path, mark = tmp_path / "optimizer.pt", tmp_path / "ran"
    torch.save({"state": {0: Harmful(mark)}, "param_groups": [{"params": [0]}]}, path)
    with pytest.raises(UpdateError, match=rf"{re.escape(str(path))}.*mkdir.*not run"):
        update_of_state(tiny_gpt2, path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it is a working trap
    assert mark.exists()


def test_what_is_no_such_state_is_refused_in_one_line(tiny_gpt2, tiny_llama, tmp_path):
    models, (_, second) = trained(tiny_gpt2, tmp_path)
    (tmp_path / "other").mkdir()
    _, (other, _) = trained(tiny_llama, tmp_path / "other")
    empty, words, plain = (tmp_path / name for name in ("empty.pt", "words.pt", "plain.pt"))
    empty.write_bytes(b"")
    torch.save({"words": 1}, words)
    torch.save({"state": {0: {"step": 1}}, "param_groups": [{"params": [0]}]}, plain)
    refused = {empty: "format", words: "state_dict", plain: "momentum", tmp_path / "no.pt": "no such file"}
    for path, said in refused.items():
        with pytest.raises(UpdateError, match=said):
            update_of_state(tiny_gpt2, path)
    with pytest.raises(UpdateError, match="shapes"):
        update_of_state(tiny_gpt2, other)
    with pytest.raises(UpdateError, match="different parameters"):
        update_of_state(models[1], second, before=other)
    with pytest.raises(UpdateError, match="one apart"):
        update_of_state(models[1], second, before=second)
