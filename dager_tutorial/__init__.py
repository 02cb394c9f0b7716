"""DAGER: exact gradient inversion for language models, as a tutorial and as an audit.

The calls of the quick start are imported when they are first used: `import dager_tutorial` and `dager --help` load
neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from dager_tutorial.client.config import ClientConfig
    from dager_tutorial.client.step import client_update, play
    from dager_tutorial.evaluation.metrics import score
    from dager_tutorial.server.attack import attack
    from dager_tutorial.zoo.names import load_model

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "client.config": ["ClientConfig"],
        "client.step": ["client_update", "play"],
        "evaluation.metrics": ["score"],
        "server.attack": ["attack"],
        "zoo.names": ["load_model"],
    },
)
