"""A plain PyTorch optimiser: the gradient of each step, the moment before it moves the weights.

Chapter `12_federated`. PyTorch's own hook: no training loop has to be changed, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dager_tutorial.frameworks.capturing import gradients_of
from dager_tutorial.update import Update


def capture_steps(
    optimizer: Optimizer, network: nn.Module, receive: Callable[[Update], object], *, model: str | None = None
) -> RemovableHandle:
    """Hand over the gradient of every step of an optimiser: clipped, accumulated and averaged as it is used.

    Args:
        optimizer: Any of PyTorch's, or one that inherits from theirs.
        network: What it trains; the update has the names of its `named_parameters()`.
        receive: Called with each update.
        model: The model's name, for people to read.

    Returns:
        A handle; `remove()` ends it.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from dager_tutorial.frameworks.capturing import save_beside
        >>> layer, folder = nn.Linear(1, 1), mkdtemp()
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = capture_steps(optimizer, layer, lambda update: print(save_beside(update, folder, "step").name))
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     layer(torch.ones(1)).backward()
        ...     optimizer.step()
        step.safetensors
        step-2.safetensors
        >>> handle.remove()

    Chapter `12_federated`.
    """

    def captured(stepping: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        receive(Update(gradients_of(network.named_parameters()), model=model))

    return optimizer.register_step_pre_hook(captured)
