"""Every path runs where the model lies: on a device that stands in for a GPU, with true numbers and no mixing.

A backward pass asks the device itself for streams, so that of the client only the loss is computed there.
"""

from __future__ import annotations

import pytest
import torch
from far_device import Far, FarDevice
from helpers import every, searched

from dager_tutorial.client import step
from dager_tutorial.client.batch import read_batch
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defended import Protection, play_defended
from dager_tutorial.client.defenses.pruning import Pruning
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.client.step import client_update
from dager_tutorial.models import tap
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.inspection import inspect_update

TEXTS = ["the dog is good", "a cat and the animal", "the boy had no idea"]
MODELS = every("tiny_gpt2", "tiny_llama", "mistral", "tiny_bert", "tiny_distilbert", "tiny_roberta")


@pytest.fixture(params=[True, False], ids=["cuda", "without float64"])
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FarDevice:
    """A device, one that has float64 and one that, like Apple's, has not."""
    if not request.param:
        monkeypatch.setattr(tap, "NO_FLOAT64", frozenset({"cuda"}))
    return FarDevice(doubles=request.param)


def test_the_device_is_one(there: FarDevice) -> None:
    with there:
        far = torch.ones(2, 3, device=there.device)
        assert isinstance(far, Far) and far.device == there.device and (far + 1).sum().item() == 12
        assert type(far.cpu()) is torch.Tensor
        with pytest.raises(AssertionError, match="mixes devices"):
            far @ torch.ones(3)
        if not there.doubles:
            with pytest.raises(TypeError, match="float64"):
                far.double()
        assert there.operations > 2


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
def test_the_attack_runs_where_the_model_lies(model: LanguageModel, there: FarDevice) -> None:
    update = client_update(model, TEXTS)
    with there:
        far = there.move(model)
        found, ranks = searched(far, update), inspect_update(far, update).rows
    assert there.operations > 500
    expected = searched(model, update)
    assert found.sequences == expected.sequences and len(ranks) > 3
    assert found.status == expected.status


@every("tiny_gpt2", "tiny_llama")
@pytest.mark.parametrize(
    "protection",
    [Protection(dropout=0.1), Protection(chain=(Pruning(20),)), Protection(chain=(Rounding("int8"),))],
    ids=["dropout", "pruned", "int8"],
)
def test_the_attack_on_a_defended_update_runs_there_too(
    model: LanguageModel, protection: Protection, there: FarDevice
) -> None:
    update = play_defended(model, TEXTS[:1], protection=protection).update
    with there:
        found = searched(there.move(model), update)
    assert there.operations > 100
    assert found.sequences == searched(model, update).sequences


@MODELS
@pytest.mark.parametrize("task", ["classification", "training"])
def test_the_clients_loss_is_computed_where_the_model_lies(task: str, model: LanguageModel, there: FarDevice) -> None:
    config = ClientConfig(task=task if task == "classification" else _training(model))
    near = _loss(model, config)
    with there, torch.no_grad():
        far = _loss(there.move(model), config)
        assert far.device == there.device
        torch.testing.assert_close(far.cpu(), near)


def _loss(model: LanguageModel, config: ClientConfig) -> torch.Tensor:
    batch = read_batch(model, TEXTS, None, config)
    network = step.ready(model, batch, config)
    with step.training(network, config):
        return step.loss_of(network, batch, config).detach()


def _training(model: LanguageModel) -> str:
    """The task that trains the whole text."""
    if model.tokenizer.mask_token_id is None and "bert" in model.name:
        return "classification"
    return "masked" if "bert" in model.name else "next_token"
