"""What every attack of a sweep is: options that it reads, and a call on what it receives.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from dager_tutorial.client.batch import Truth
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.update import Update


@dataclass(frozen=True)
class Received:
    """What an attacker gets.

    Attributes:
        model: The model both sides know.
        update: What the client sent.
        head: The head that the server handed out.
        truth: What a prior attack is told besides, by its own definition (lengths, labels); the others get none of it.
    """

    model: LanguageModel
    update: Update
    head: Head
    truth: Truth


class Found(NamedTuple):
    """What an attack found.

    Attributes:
        reconstruction: The texts.
        columns: What else its row is to say, by column.
    """

    reconstruction: Reconstruction
    columns: Mapping[str, Any] = MappingProxyType({})


class Attacker(NamedTuple):
    """An attack.

    Attributes:
        read: Makes its record of options from JSON values; raises DagerError where there are no such options.
        run: Attacks, with these options.
    """

    read: Callable[[Mapping[str, Any]], Any]
    run: Callable[[Received, Any], Found]
