"""Training a low-rank adapter with peft: what the server hands out, and what a client then sends.

Chapter `13_adapters`. Needs the extra `adapters` (peft).

The client's network is peft's own: its layers around the frozen weights. It sends the gradients of A and B (and of a
head, if there is one), under the names of peft's files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dager_tutorial.client.batch import encode
from dager_tutorial.client.constraints import OneOf, Within, check_options, option
from dager_tutorial.errors import DagerError
from dager_tutorial.models.heads import Head, choose_pad, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import LowRankMaps, maps_of
from dager_tutorial.models.training import filled_and_masked

INITIALISATIONS = ("default", "gaussian", "pissa", "olora", "orthogonal")
TRAINED_ON = 8  # texts of each step in which the server trains an adapter before it hands it out


@dataclass(frozen=True)
class LoraConfig:
    """An adapter as peft configures it, and how far it is trained when the server hands it out.

    Attributes:
        rank: Its rank r.
        alpha: Its scaling times r; None for twice the rank.
        targets: The ends of the names of the maps that it adapts; `all-linear` for all linear maps of the blocks.
        init: How peft draws it. `default` and `gaussian` begin with B = 0, so that A has no gradient in the first step;
            `pissa`, `olora` and `orthogonal` do not.
        steps: Steps of AdamW, on other texts, before it is handed out.
        learning_rate: Of these steps.
        seed: Seed of the draw, and of the head that is trained on.

    Raises:
        DagerError: An option may not have its value.

    See chapter `13_adapters`.
    """

    rank: int = option(8, Within(1, 2**16), "Rank of the adapter.")
    alpha: float | None = option(None, Within(0, whole=False, optional=True), "Scaling of the adapter times its rank.")
    targets: str | Sequence[str] = option("all-linear", OneOf(("all-linear",), names=True), "Maps that are adapted.")
    init: str = option("default", OneOf(INITIALISATIONS), "How peft draws the adapter.")
    steps: int = option(0, Within(0, 2**16), "Steps in which it was trained before.")
    learning_rate: float = option(1e-3, Within(0, whole=False), "Learning rate of these steps.")
    seed: int = option(0, Within(-(2**63), 2**64 - 1), "Seed of the draw.")

    def __post_init__(self) -> None:
        """Freeze a list of names, then check every option."""
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        check_options(self)


def hand_out(
    model: LanguageModel,
    config: LoraConfig | None = None,
    *,
    texts: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Draw an adapter with peft, train it a little on public texts, and hand it out.

    Args:
        model: The base model, which is left as it is.
        config: The adapter.
        texts: What it is trained on, labels alternating: eight a step.
        folder: Where peft's files of it are written, if anywhere.

    Returns:
        The model as both sides know it from now on.

    Raises:
        DagerError: peft is not installed, refuses the configuration, or there are too few texts.

    See chapter `13_adapters`.
    """
    config = config or LoraConfig()
    if len(texts) < TRAINED_ON * config.steps:
        raise DagerError(f"{config.steps} steps take {TRAINED_ON * config.steps} texts and {len(texts)} are given")
    network = copy.deepcopy(model.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapted = _peft().get_peft_model(network, _peft_config(model, config))
    if config.steps:
        _train(network, model, config, texts)
    if folder is not None:
        adapted.save_pretrained(folder)
    return model.adapted(maps_of(network, model.network))


def with_adapter(network: PreTrainedModel, maps: LowRankMaps) -> PreTrainedModel:
    """A copy of a backbone with peft's layers in place of the adapted maps, in the backbone's dtype.

    Args:
        network: The headless model, merged.
        maps: The adapter that the server handed out.

    Raises:
        DagerError: peft is not installed.
    """
    peft, memo = _peft(), {id(parameter): parameter for parameter in network.parameters()}
    client = copy.deepcopy(network, memo)
    ranks, fused = {name: each.rank for name, each in maps.items()}, any(each.input_first for each in maps.values())
    config = peft.LoraConfig(target_modules=list(maps), rank_pattern=ranks, fan_in_fan_out=fused)
    peft.inject_adapter_in_model(config, client)
    for name, each in maps.items():
        module: Any = client.get_submodule(name)
        module.base_layer.weight = _frozen(each.base, network)
        module.lora_A["default"].weight = _frozen(each.down, network)
        module.lora_B["default"].weight = _frozen(each.up, network)
        module.scaling["default"] = each.scaling
    return client.eval()


def _frozen(value: torch.Tensor, network: PreTrainedModel) -> nn.Parameter:
    return nn.Parameter(value.to(network.device, network.dtype, copy=True), requires_grad=False)


def _peft() -> Any:
    """The library, which is an extra."""
    try:
        import peft
    except ImportError:
        raise DagerError("adapters need peft: pip install 'dager-tutorial[adapters]'") from None
    return peft


def _peft_config(model: LanguageModel, config: LoraConfig) -> Any:
    """The same in peft's words."""
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        init_lora_weights=True if config.init == "default" else config.init,
        fan_in_fan_out=model.network.config.model_type == "gpt2",
    )


def _train(network: PreTrainedModel, model: LanguageModel, config: LoraConfig, texts: Sequence[str]) -> None:
    """A few steps of AdamW on texts that are nobody's secret."""
    client = with_head(network, model.tokenizer, Head(seed=config.seed))
    ids = encode(model.tokenizer, texts[: TRAINED_ON * config.steps])
    token = choose_pad(client, model.tokenizer, ids)
    trained = [parameter for name, parameter in client.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    for start in range(0, len(ids), TRAINED_ON):
        rows = ids[start : start + TRAINED_ON]
        inputs, mask = filled_and_masked(rows, token, device=model.device)
        labels = torch.arange(len(rows), device=model.device) % 2
        optimizer.zero_grad()
        client(input_ids=inputs, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
