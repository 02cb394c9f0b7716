"""What is known of the models that come by name, without loading any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dager_tutorial.zoo.memory import FLOAT32, Needs, needs_of
from dager_tutorial.zoo.pinned import PINNED, is_cached, is_tokenizer_cached
from dager_tutorial.zoo.random import BUILT_IN, RANDOM, fitting_tokenizer


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model without loading it.

    Attributes:
        name: What `load_model` takes.
        architecture: The `model_type` of its configuration.
        parameters: Number of parameters of the headless model.
        width: Hidden size.
        blocks: Number of transformer blocks.
        whole: Bytes that its weights take in memory, in float32.
        streamed: Bytes that they take where deeper blocks are read from files when they run.
        licence: SPDX identifier; empty for random weights.
        source: Where the weights come from.
        cached: Whether loading it needs neither network nor conversion.
    """

    name: str
    architecture: str
    parameters: int
    width: int
    blocks: int
    whole: int
    streamed: int
    licence: str
    source: str
    cached: bool


def pinned_record(name: str, cache: Path) -> ModelRecord:
    """The record of a real model.

    Args:
        name: A key of `PINNED`.
        cache: The cache folder.
    """
    pinned = PINNED[name]
    needs = Needs.of(pinned.parameters, pinned.block_parameters, pinned.blocks)
    return ModelRecord(
        name=name,
        architecture=pinned.architecture,
        parameters=pinned.parameters,
        width=pinned.width,
        blocks=pinned.blocks,
        whole=needs.whole,
        streamed=needs.streamed,
        licence=pinned.licence,
        source=f"{pinned.title}, PyPI {pinned.wheel.requirement}",
        cached=is_cached(name, cache),
    )


def random_record(name: str, cache: Path) -> ModelRecord:
    """The record of a random model; its parameters are counted without memory for them.

    Args:
        name: A key of `BUILT_IN`.
        cache: The cache folder.

    >>> random_record("gpt2", Path("cache")).width
    768
    """
    config = BUILT_IN[name].config()
    needs = needs_of(config)
    return ModelRecord(
        name=RANDOM + name,
        architecture=config.model_type,
        parameters=needs.whole // FLOAT32,
        width=config.hidden_size,
        blocks=config.num_hidden_layers,
        whole=needs.whole,
        streamed=needs.streamed,
        licence="",
        source=f"seeded random weights in the shape of {BUILT_IN[name].original}",
        cached=is_tokenizer_cached(fitting_tokenizer(config), cache),
    )
