"""Flower: real apps in one process, every client's update kept and read by the command line, and a mod that refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian

from dager_tutorial import attack
from dager_tutorial.cli import main
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, play_locally
from dager_tutorial.frameworks.flower import Auditing, Capturing, run_in_process
from dager_tutorial.frameworks.policy import Policy
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.status import Certainty, Status
from dager_tutorial.update import Update

EXAMPLE = Path(__file__).parent.parent / "examples" / "flower_round.py"
_spec = importlib.util.spec_from_file_location("flower_round", EXAMPLE)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return example.small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No socket is opened, and nothing is written where Flower keeps its own files."""
    home = tmp_path / "flwr-home"
    monkeypatch.setenv("FLWR_HOME", str(home))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    yield
    assert not home.exists()


def recovered(folder: Path, file: str, model: str) -> dict:
    """What the command line recovers of a captured file."""
    result = folder / "result.json"
    assert main(["recover", str(folder / file), "--model", str(folder / model), "--json", str(result)]) == 0
    return json.loads(result.read_text("utf-8"))


def test_four_clients_of_two_rounds_are_captured_and_recovered_exactly(model: LanguageModel, tmp_path: Path) -> None:
    server = example.server_app(model, tmp_path, rounds=2)
    assert run_in_process(server, example.client_app(model), clients=4) == []
    for server_round in (1, 2):
        for number, texts in enumerate(example.TEXTS):
            file = f"round-{server_round:03d}-client-{number + 1}.safetensors"
            update = Update.load(tmp_path / file)
            assert (update.kind, update.learning_rate, update.model) == ("delta", example.RATE, model.name)
            assert list(update.gradients) == sorted(dict(example.classifier(model).named_parameters()))
            found = recovered(tmp_path, file, f"round-{server_round:03d}-model")
            assert sorted(found["texts"]) == sorted(texts), file
            assert Status(found["status"]).claims_all


def test_no_older_file_is_overwritten_and_any_strategy_can_be_listened_to(model: LanguageModel, tmp_path: Path) -> None:
    results = []
    plain = FedMedian(fraction_evaluate=0.0)
    for strategy in (plain, Capturing(plain, tmp_path), Capturing(plain, tmp_path)):
        server = ServerApp()

        @server.main()
        def start(grid, context, strategy=strategy):
            results.append(strategy.start(grid, ArrayRecord(example.classifier(model).state_dict()), num_rounds=1))

        assert run_in_process(server, example.client_app(model), clients=2) == []
    names = ["round-001-client-1-2", "round-001-client-1", "round-001-client-2-2", "round-001-client-2"]
    assert sorted(path.stem for path in tmp_path.glob("*.*")) == sorted(names)
    alone, heard, _ = (result.arrays.to_torch_state_dict() for result in results)
    assert all(torch.equal(alone[name], heard[name]) for name in alone)


def test_the_mod_refuses_and_the_strategy_counts_failures(
    model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    found: list[Reconstruction] = []
    client = example.client_app(model, Auditing(model, report=found.append))
    failures = run_in_process(example.server_app(model, tmp_path), client, clients=4, quiet=False)
    assert [failure.client for failure in failures] == [1, 2, 3, 4]
    for failure, audit, texts in zip(failures, found, example.TEXTS, strict=True):
        assert sorted(audit.texts) == sorted(texts)
        assert failure.reason.startswith("not sent: 3 of 3 texts confirmed")
        assert not any(text in failure.reason for text in texts)
    assert "aggregate_train: Received 0 results and 4 failures" in caplog.text
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_policy_may_allow_it_and_the_mod_sees_what_mods_behind_it_do(model: LanguageModel, tmp_path: Path) -> None:
    lenient = Auditing(model, Policy(confirmed=1.0, recovered=1.0))
    noisy = (Auditing(model), LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=1e-5))
    late = Auditing(model, limits=AttackConfig(time_budget=1e-9))
    reasons = [
        [failure.reason for failure in run_in_process(example.server_app(model, tmp_path), app, clients=2)]
        for app in (example.client_app(model, *mods) for mods in ((lenient,), noisy, (late,)))
    ]
    assert reasons == [
        [],
        [],
        ["not sent: the audit ended without an answer (out_of_time), and the policy allows none such"] * 2,
    ]


def test_what_clients_send_amiss_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, client = ServerApp(), ClientApp()
    replies = {1: [np.ones((2, 3)), np.zeros(4)], 2: [np.full((2, 3), np.nan), np.zeros(4)], 4: [np.ones(1)] * 2}

    @client.train()
    def train(message, context):
        message.content["arrays"] = ArrayRecord([np.ones(1)])  # its own copy
        if context.node_id == 3:
            raise RuntimeError("out of memory")
        arrays = ArrayRecord(replies[context.node_id])
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    @server.main()
    def start(grid, context):
        inner = FedAvg(fraction_evaluate=0.0)
        inner.aggregate_train = lambda server_round, replies: (None, MetricRecord({"n": len(replies)}))
        strategy = Capturing(inner, tmp_path, names=["w", "b"])
        result = strategy.start(grid, ArrayRecord([np.zeros((2, 3)), np.zeros(4)]), num_rounds=1)
        assert result.train_metrics_clientapp[1]["n"] == 4

    failures = run_in_process(server, client, clients=4, quiet=False)
    assert failures == [(3, "RuntimeError: out of memory")]
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["round-001-client-1"]
    assert Update.load(tmp_path / "round-001-client-1.safetensors").gradients["w"].tolist() == [[1.0] * 3] * 2
    assert "client 2's reply was not captured: tensor 'w' holds NaN" in caplog.text
    assert "client 4's reply was not captured: tensor 'w' came back" in caplog.text


def test_gradients_are_taken_as_they_come(tmp_path: Path) -> None:
    server, client = ServerApp(), ClientApp()

    @client.train()
    def train(message, context):
        arrays = ArrayRecord({"w": Array(np.ones(2, np.float32)), "steps": Array(np.array([3]))})
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    @server.main()
    def start(grid, context):
        Capturing(FedAvg(fraction_evaluate=0.0), tmp_path, kind="gradient").start(
            grid, ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=1
        )

    assert run_in_process(server, client, clients=2) == []
    update = Update.load(tmp_path / "round-001-client-2.safetensors")
    assert update.kind == "gradient"
    assert {name: tensor.tolist() for name, tensor in update.gradients.items()} == {"w": [1.0, 1.0]}


def test_the_audit_itself_failing_is_no_permission(model: LanguageModel) -> None:
    asked = ArrayRecord({"elsewhere": Array(np.ones(2))})
    server, client = ServerApp(), ClientApp(mods=[Auditing(model)])

    @client.train()
    def train(message, context):
        return Message(RecordDict({"a": asked}), reply_to=message)

    @server.main()
    def start(grid, context):
        list(grid.send_and_receive([Message(RecordDict({"a": asked}), 1, "train")]))

    [failure] = run_in_process(server, client, clients=1)
    assert failure.reason.startswith("not sent: the audit failed (no tensor of the update belongs to the gpt2 model")


@pytest.mark.parametrize("texts", example.TEXTS)
def test_no_beginning_of_a_text_is_called_whole_where_steps_moved_the_inputs(
    model: LanguageModel, texts: list[str]
) -> None:
    """A text's last token but one lies so near its last in the last block that the span test lets it pass."""
    training = LocalTraining(3, 1, 1e-4)
    update, truth = play_locally(model, texts, config=ClientConfig(head_std=0.02), training=training)
    found = attack(model, update)
    whole = [by.certainty is Certainty.WHOLE for by in found.confirmations]
    assert set(itertools.compress(found.sequences, whole)) <= set(truth.sequences)
    assert set(truth.sequences) <= set(found.sequences)
