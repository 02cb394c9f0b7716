"""The option of the server's side that says which head it handed out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

if TYPE_CHECKING:
    from dager_tutorial.models.heads import Head


@dataclass(frozen=True)
class HeadOptions:
    """The head that the server handed out; it is the server's to know."""

    trained: Annotated[
        Literal["classification", "next_token", "masked"] | None,
        Option("--trained", help="The client's task; read off the update by default."),
    ] = None
    classes: Annotated[int, Option("--classes", min=2, help="Classes, where the head's gradient was not sent.")] = 2
    head: Annotated[
        Path | None,
        Option("--head", help="A safetensors file of the head's weights by name; drawn from --seed by default."),
    ] = None

    def load(self, seed: int) -> Head | None:
        """The head; None where the attack is to read the task off the update.

        Args:
            seed: Seed of a head that is drawn.

        Raises:
            DagerError: The file cannot be read.
        """
        from dager_tutorial.models.heads import Head
        from dager_tutorial.update import Update

        if self.trained is None and self.head is None and not seed and self.classes == 2:
            return None
        weights = Update.load(self.head).gradients if self.head is not None else {}
        return Head(self.trained or "classification", self.classes, seed, weights=weights)
