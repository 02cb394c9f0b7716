"""Optimisers, Opacus and the Trainer: what is captured there is the update that a client sends."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from dager_tutorial import attack, client_update
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.errors import DagerError
from dager_tutorial.frameworks.capturing import save_beside, with_weights
from dager_tutorial.frameworks.hook import capture_steps
from dager_tutorial.frameworks.opacus import capture_private_steps
from dager_tutorial.frameworks.policy import Policy
from dager_tutorial.frameworks.trainer import AuditingCallback
from dager_tutorial.models.heads import Head, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.update import Update

TEXTS = ["the river was cold and green again", "my father could see the old house", "we never ask about the money here",
         "a doctor came before the long night"]  # fmt: skip
LABELS = [0, 1, 0, 1]
STD = ClientConfig(head_std=0.02)


def classifier(model: LanguageModel) -> PreTrainedModel:
    """A copy of the model under a head, to train."""
    return copy.deepcopy(with_head(model.network, model.tokenizer, Head(std=0.02))).requires_grad_(True)


def inputs(model: LanguageModel) -> dict[str, Tensor]:
    """The batch as transformers takes it; all texts are of seven words."""
    ids = torch.tensor(model.tokenizer(TEXTS)["input_ids"])
    return {"input_ids": ids, "labels": torch.tensor(LABELS)}


def test_a_hook_hands_over_what_a_client_sends(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    network, kept = classifier(tiny_gpt2), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    handle = capture_steps(optimizer, network, kept.append, model=tiny_gpt2.name)
    network(**inputs(tiny_gpt2)).loss.backward()
    optimizer.step()
    handle.remove()
    optimizer.step()
    [update], expected = kept, client_update(tiny_gpt2, TEXTS, LABELS, config=STD)
    assert (update.kind, update.model) == ("gradient", tiny_gpt2.name)
    assert update.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(update.gradients[name], gradient, rtol=1e-4, atol=1e-7)
    found = attack(tiny_gpt2, Update.load(save_beside(update, tmp_path, "step")), head=Head(std=0.02))
    assert found.status is Status.CERTIFIED and sorted(found.texts) == sorted(TEXTS)
    optimizer.zero_grad()
    capture_steps(optimizer, network, kept.append)
    with pytest.raises(DagerError, match="no parameter has a gradient"):
        optimizer.step()


def private_update(model: LanguageModel, clip: float, noise: float) -> tuple[Update, float]:
    """What one step of a private optimiser sends of the batch, and the epsilon that its accountant counts."""
    network, batch = classifier(model), inputs(model)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*batch.values()), batch_size=len(TEXTS))
    kept: list[Update] = []
    with warnings.catch_warnings():  # Opacus warns of randomness that is not cryptographic, torch of its hooks
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp")
        private, noised, _ = engine.make_private(
            module=network.train(), optimizer=optimizer, data_loader=loader, noise_multiplier=noise,
            max_grad_norm=clip, poisson_sampling=False,
        )  # fmt: skip
        capture_private_steps(noised, private, kept.append, model=model.name)
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        private(**batch, position_ids=positions).loss.backward()
        noised.step()
    return kept[0], engine.get_epsilon(1e-5) if noise else float("inf")


def undropped(model: LanguageModel) -> LanguageModel:
    """The same model, without dropout where it is trained."""
    network = copy.deepcopy(model.network)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return LanguageModel(model.name, network, model.tokenizer)


def test_opacus_sends_the_clipped_and_noised_gradient(tiny_gpt2: LanguageModel) -> None:
    model = undropped(tiny_gpt2)
    plain, _ = private_update(model, clip=1e9, noise=0.0)
    for name, gradient in client_update(model, TEXTS, LABELS, config=STD).gradients.items():
        torch.testing.assert_close(plain.gradients[name], gradient, rtol=1e-3, atol=1e-6)
    clipped, _ = private_update(model, clip=0.01, noise=0.0)
    norm = sum(float(gradient.square().sum()) for gradient in clipped.gradients.values()) ** 0.5
    assert norm <= 0.01 * 1.001
    assert sorted(attack(model, clipped).texts) == sorted(TEXTS)  # clipping weighs texts, and hides none
    noised, epsilon = private_update(model, clip=0.01, noise=1.0)
    assert 0 < epsilon < 10  # the accountant still counts
    assert attack(model, noised).confirmed == ()


def test_the_trainer_s_steps_are_audited(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    audits: list[tuple[int, Reconstruction]] = []
    model, batch = undropped(tiny_gpt2), inputs(tiny_gpt2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-3, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", max_grad_norm=0.0, seed=0,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(*batch.values(), strict=True)]
    callback = AuditingCallback(
        model, every=2, folder=tmp_path / "kept", report=lambda step, found: audits.append((step, found))
    )
    Trainer(classifier(model), arguments, train_dataset=rows, callbacks=[callback]).train()
    assert [step for step, _ in audits] == [1, 3]
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == [
        "step-000001.safetensors",
        "step-000003.safetensors",
    ]
    for _, found in audits:  # the third at weights that have moved, under a head that has
        assert found.status is Status.CERTIFIED and len(found.texts) == 2 and set(found.texts) < set(TEXTS)


def test_without_somebody_to_tell_the_log_is_told_in_counts(
    tiny_gpt2: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import TrainerControl, TrainerState

    network = classifier(tiny_gpt2)
    network(**inputs(tiny_gpt2)).loss.backward()
    callback = AuditingCallback(tiny_gpt2)
    callback.on_pre_optimizer_step(
        TrainingArguments(use_cpu=True), TrainerState(global_step=4), TrainerControl(), model=network
    )
    assert caplog.messages == ["step 5: certified, 4 texts recovered"]
    assert caplog.records[0].levelno == logging.WARNING


def test_policies_count_texts_and_refuse_what_is_no_answer() -> None:
    whole, guess = Confirmation(Certainty.WHOLE), Confirmation(Certainty.GUESS)
    three = ((1,), (2,), (3,)), ("a", "b", "c"), (1.0, 1.0, 1.0)
    found = Reconstruction(*three, Status.PARTIAL, (whole, guess, guess), copies=(2, None, 1))
    assert Policy().objection(found, 8).startswith("2 of 8 texts confirmed")
    assert Policy(confirmed=0.25).objection(found, 8).startswith("4 of 8 texts recovered")
    assert Policy(confirmed=0.25, recovered=0.5).objection(found, 8) is None
    assert Policy(confirmed=0.25, recovered=0.5).objection(found) == (
        "2 of 4 texts confirmed (partial), and the policy allows a share of 0.25"
    )
    assert Policy(1.0, 1.0).objection(found, 1) is None  # more answers than texts are not more than all
    for status in Status:
        nothing = Reconstruction((), (), (), status)
        objected = Policy().objection(nothing, 4) is not None
        assert objected == (status in (Status.OUT_OF_TIME, Status.WRONG_MODEL))
        assert Policy(unread=True).objection(nothing, 4) is None
    with pytest.raises(DagerError, match=r"recovered is 1\.5: give a share from 0 to 1"):
        Policy(recovered=1.5)


def test_weights_that_travel_take_the_place_of_the_model_s(tiny_gpt2: LanguageModel) -> None:
    network = classifier(tiny_gpt2)
    weights = {name: 2 * parameter.detach() for name, parameter in network.named_parameters()}
    other = with_weights(tiny_gpt2, weights)
    assert torch.equal(other.network.wte.weight, 2 * tiny_gpt2.network.wte.weight)
    assert other.tokenizer is tiny_gpt2.tokenizer and not any(p.requires_grad for p in other.network.parameters())
    del weights["transformer.wte.weight"]
    assert torch.equal(with_weights(tiny_gpt2, weights).network.wte.weight, tiny_gpt2.network.wte.weight)
    with pytest.raises(DagerError, match="no parameter of the gpt2 model"):
        with_weights(tiny_gpt2, {"transformer.wte.wait": torch.ones(1)})
