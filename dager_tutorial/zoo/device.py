"""Devices by name, checked before anything is loaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dager_tutorial.errors import ModelError
from dager_tutorial.zoo.quiet import explained


def to_device(network: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move a backbone, after checking that the device is there (see `check_device`)."""
    chosen = check_device(device)
    with explained(f"device {device}"):
        return network.to(chosen)


def check_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Args:
        device: `cpu`, `mps`, `cuda`, or one of several as `cuda:1`.

    Returns:
        The device.

    Raises:
        ModelError: No such device here.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"unknown device {device!r}: use cpu, cuda, cuda:0 or mps") from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if chosen.type not in available:
        raise ModelError(f"unknown device {device!r}: use cpu, cuda, cuda:0 or mps")
    if (chosen.index or 0) >= available[chosen.type]:
        raise ModelError(f"device {device} is not available on this machine: use --device cpu")
    return chosen
