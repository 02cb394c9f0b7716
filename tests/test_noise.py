"""Updates with strong noise: little comes back, and nothing false is called certain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import every, truth

from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.status import Certainty
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0])
def test_under_strong_noise_no_false_text_is_called_whole(
    model: LanguageModel, noise: float, random_texts: Draw
) -> None:
    """False rows pass every test there, the last block's included: spans without a clear gap confirm no text."""
    reported = 0
    for seed in range(3):
        texts = random_texts(3, seed)
        draw = torch.Generator().manual_seed(seed)
        noisy = {
            name: tensor + noise * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=draw)
            for name, tensor in client_update(model, texts).gradients.items()
        }
        found = attack(model, Update(noisy), config=AttackConfig(time_budget=5.0))
        reported += len(found.sequences)
        pairs = zip(found.sequences, found.confirmations, strict=True)
        whole = {ids for ids, confirmation in pairs if confirmation.certainty is Certainty.WHOLE}
        assert whole <= truth(model, texts)
    assert reported
