"""NVFLARE: a DXO, from memory or its file, is the update that it carries, and a filter blocks it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, local_update
from dager_tutorial.errors import DagerError
from dager_tutorial.frameworks import nvflare
from dager_tutorial.frameworks.nvflare import AuditingFilter, read_dxo, update_of_dxo
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update

TEXTS = ["the river was cold and green again", "my father could see the old house"]


@pytest.fixture
def sent(tiny_gpt2: LanguageModel) -> Update:
    """One step of a client: what its weights moved."""
    return local_update(
        tiny_gpt2, TEXTS, config=ClientConfig(head_std=0.02), training=LocalTraining(1, 2, learning_rate=1e-2)
    )


def dxo_of(update: Update) -> DXO:
    return DXO(DataKind.WEIGHT_DIFF, {name: tensor.numpy() for name, tensor in update.gradients.items()})


def test_a_file_holds_the_update(sent: Update, tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    common_decomposers.register()
    dxo_of(sent).to_file(str(tmp_path / "result.dxo"))
    update = update_of_dxo(read_dxo(tmp_path / "result.dxo"), model="tiny")
    assert (update.kind, update.model, update.gradients.keys()) == ("delta", "tiny", sent.gradients.keys())
    assert all(torch.equal(update.gradients[name], sent.gradients[name]) for name in sent.gradients)
    before = {name: torch.ones_like(tensor) for name, tensor in sent.gradients.items()}
    whole = DXO(DataKind.WEIGHTS, {name: (before[name] + 1).numpy() for name in before})
    assert all(bool((moved == 1).all()) for moved in update_of_dxo(whole, before).gradients.values())
    with pytest.raises(DagerError, match="give those that the client got"):
        update_of_dxo(whole)
    with pytest.raises(DagerError, match="holds 'METRICS'"):
        update_of_dxo(DXO(DataKind.METRICS, {"loss": 1.0}))
    (tmp_path / "broken.dxo").write_bytes(b"no such thing")
    with pytest.raises(DagerError, match=r"broken\.dxo' cannot be read as a DXO"):
        read_dxo(tmp_path / "broken.dxo")


def test_the_filter_blocks_what_its_policy_objects_to(
    sent: Update, tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvflare, "load_model", lambda name: tiny_gpt2)
    strict, lenient, context = AuditingFilter("tiny"), AuditingFilter("tiny", 1.0, 1.0), FLContext()
    shareable = dxo_of(sent).to_shareable()
    assert lenient.process(shareable, context) is shareable
    with pytest.raises(ContentBlockedException, match="not sent: 2 of 2 texts confirmed"):
        strict.process(shareable, context)
    with pytest.raises(ContentBlockedException, match="the audit failed"):
        lenient.process(DXO(DataKind.WEIGHTS, dxo_of(sent).data).to_shareable(), context)
    filtered = PercentilePrivacy().process(dxo_of(sent).to_shareable(), context)  # the defaults of a site
    with pytest.raises(ContentBlockedException, match="2 of 2 texts"):
        strict.process(filtered, context)
