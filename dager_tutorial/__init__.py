"""DAGER: exact gradient inversion for language models, as a tutorial and as an audit.

The four calls of the quick start are imported when they are first used: `import dager_tutorial` and
`dager --help` load neither torch nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attack import attack
    from .client import client_update
    from .metrics import score
    from .models.zoo import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "attack", "client_update", "load_model", "score"]

HOMES = {"load_model": ".models.zoo", "client_update": ".client", "attack": ".attack", "score": ".metrics"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


class _Package(ModuleType):
    """Keeps `dager_tutorial.attack` the function, where importing the file of that name puts a module."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_file = name in HOMES and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_file else value)


sys.modules[__name__].__class__ = _Package
