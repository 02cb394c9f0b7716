"""Models of the Hugging Face hub: cached files first, then the network, and a quick end if there is none."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError

from dager_tutorial.errors import ModelError
from dager_tutorial.zoo.quiet import first_line, quiet

PATIENCE = 5.0
"""Seconds to wait for the hub's first answer."""

DESCRIPTION = [
    "config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "*.jinja",
]
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `owner/model`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def hub_folder(name: str, *, weights: bool) -> Path:
    """A local folder with a hub model's files.

    Args:
        name: `owner/model`.
        weights: Whether its safetensors files are wanted too.

    Returns:
        A folder in the hub's own cache.

    Raises:
        ModelError: The hub cannot be reached, or has no such model.
    """
    patterns = DESCRIPTION + (WEIGHTS if weights else [])
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if _is_complete(folder, weights):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    return _download(name, patterns)


def _download(name: str, patterns: list[str]) -> Path:
    try:
        with quiet():
            HfApi().model_info(name, timeout=PATIENCE)  # the download itself would try again for minutes
            return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=PATIENCE))
    except Exception as error:  # the hub's own kinds and the HTTP library's: it is not to be had
        raise ModelError(
            f"{name!r} is no local folder and cannot be had from the Hugging Face hub ({first_line(error)}): "
            "give a local checkpoint folder, or a name that `dager models` lists, such as random:gpt2"
        ) from error


def _is_complete(folder: Path, weights: bool) -> bool:
    if not (folder / "config.json").is_file():
        return False
    return not weights or any(folder.glob("model*.safetensors"))
