"""A second device that there is none of: its tensors say they lie elsewhere, hold true numbers, mix with no others.

Every operation on them runs on the CPU, after checking what a real device checks: that all tensors lie on it (numbers
without dimensions apart), and, of Apple's, that none is float64.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dager_tutorial.models.language_model import LanguageModel

MOVES = {"aten._to_copy.default", "aten.copy_.default", "aten._local_scalar_dense.default"}

ASKING = {"__getitem__", "__setitem__", "__float__", "__int__", "__bool__", "__index__", "tolist", "item"}
ASKING |= {
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_tensor",
    "is_nonzero",
    "contiguous",
    "nonzero",
    "__invert__",
}
"""Bindings of PyTorch that ask the device itself before they come to an operation."""


class Far(Tensor):
    """A tensor elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Far:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **shape)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{operation} outside the device's mode")


def is_far(value: object) -> bool:
    """Whether something is a tensor elsewhere."""
    return isinstance(value, Far)


def _indexes(operation: Any) -> bool:
    """Whether an operation takes indices, which may lie here where what they index lies elsewhere."""
    return getattr(operation, "__name__", "") in ("__getitem__", "index.Tensor")


def _here(value: Any) -> Any:
    return value.inner if is_far(value) else value


class _Bindings(TorchFunctionMode):
    """What PyTorch's own binding asks the device for, so that it never comes to an operation: literals and indices."""

    def __init__(self, device: FarDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if getattr(function, "__name__", None) in ASKING and any(map(is_far, tree_flatten(args)[0])):
            return self.device.run(function, args, kwargs)
        return function(*args, **kwargs)


class FarDevice(TorchDispatchMode):
    """While this is entered there is a second device.

    Args:
        doubles: Whether it has float64.
    """

    def __init__(self, *, doubles: bool) -> None:
        super().__init__()
        torch._C._ensureCUDADeviceGuardSet()  # one that guards nothing, where PyTorch has been built without CUDA
        self.device, self.doubles, self.operations, self.bindings = torch.device("cuda", 0), doubles, 0, _Bindings(self)

    def __enter__(self) -> FarDevice:
        """The device is there from here on."""
        torch.__future__.set_swap_module_params_on_conversion(True)  # a module's parameters change their type
        self.lazily = torch.cuda._lazy_init
        torch.cuda._lazy_init = lambda: None
        self.bindings.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """And gone."""
        super().__exit__(*error)
        self.bindings.__exit__(*error)
        torch.cuda._lazy_init = self.lazily
        torch.__future__.set_swap_module_params_on_conversion(False)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        return self.run(operation, args, dict(kwargs or {}))

    def run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check what a device checks, compute here, and say that the result lies there."""
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        far = [each for each in tensors if is_far(each)]
        near = [each for each in tensors if not is_far(each) and each.dim()]
        if far and near and str(operation) not in MOVES and not (_indexes(operation) and is_far(args[0])):
            raise AssertionError(f"{operation} mixes devices: {[tuple(each.shape) for each in tensors]}")
        chosen = kwargs.get("device")
        there = bool(far) if chosen is None else torch.device(chosen).type == self.device.type
        if chosen is not None and there:
            kwargs["device"] = "cpu"
        same = {id(each.inner): each for each in far}
        result = operation(*tree_map(_here, args), **tree_map(_here, kwargs))
        if str(operation) == "aten.copy_.default":
            return args[0]
        self.operations += there
        return tree_map(lambda each: self._placed(each, same) if isinstance(each, Tensor) and there else each, result)

    def _placed(self, result: Tensor, same: dict[int, Far]) -> Tensor:
        if not self.doubles and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return same[id(result)] if id(result) in same else Far(result, self.device)

    def move(self, model: LanguageModel) -> LanguageModel:
        """A copy of a model there."""
        network = copy.deepcopy(model.network)
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(Far(parameter.data, self.device), requires_grad=False)
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = Far(buffer, self.device)
        return replace(model, network=network)
