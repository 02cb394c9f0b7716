"""How many local workers memory, cores and GPUs allow (chapter `15_reproducing_the_paper`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.sweep.cells import Cell, group_of
from dager_tutorial.stopwatch import available_memory
from dager_tutorial.zoo.names import model_needs

BASE = 10**9
"""Bytes of a worker besides what grows with its model: libraries, the attack's intermediate results."""

COPIES = 5
"""Times that a model's weights lie in memory at the peak: weights, gradients, what is sent, what is left of it, and its
simulation. Measured on GPT-2, whose weights are half a gigabyte: 2.1 to 3.3 GB with all."""

TRAINED_COPIES = 7
"""The same where a client trains: its own weights and what they were besides."""


def affordable(cells: Iterable[Cell], device: str) -> int:
    """The most workers that are of use and fit, for the largest model of a sweep.

    Args:
        cells: What is to be done.
        device: `cpu`, `cuda` or `mps`: of GPUs each worker has its own.

    Returns:
        At least 1, even if nothing fits: loading the model says so.
    """
    kinds = {_kind(cell): cell for cell in cells}.values()
    by_memory = available_memory() // max(map(_bytes, kinds), default=BASE)
    by_device = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, os.cpu_count() or 1)
    return max(1, min(by_memory, by_device))


def _kind(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how much memory a cell takes."""
    return cell["model"], cell.get("model.blocks"), bool(group_of(cell, "training"))


def _bytes(cell: Mapping[str, Any]) -> int:
    """What a worker takes for a cell. An unknown model takes nothing: its own cell will say that it is unknown."""
    try:
        whole = model_needs(cell["model"], group_of(cell, "model").get("blocks")).whole
    except DagerError:
        whole = 0
    copies = TRAINED_COPIES if group_of(cell, "training") else COPIES
    return BASE + copies * whole
