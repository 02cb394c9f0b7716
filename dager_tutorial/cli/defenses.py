"""The options of a client that defends itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.client.defended import Protection
    from dager_tutorial.client.defenses.chain import Defence

PANEL: Any = {"rich_help_panel": "Defences"}
TYPES = {"bf16": "bfloat16", "fp16": "float16", "8": "int8", "1": "sign"}  # by what --bits takes


@dataclass(frozen=True)
class DefenseOptions:
    """What the client does against an attack, in this order: dropout, clipping or DP-SGD, noise, pruning, rounding."""

    dropout: Annotated[
        float, Option("--dropout", min=0.0, max=0.9, help="Train with dropout of this probability.", **PANEL)
    ] = 0.0
    clip: Annotated[
        float | None, Option("--clip", min=0.0, help="Largest norm of the update; of a text's with --epsilon.", **PANEL)
    ] = None
    clip_each: Annotated[
        Literal["update", "tensor"], Option("--clip-each", help="What --clip bounds: all, or every tensor.", **PANEL)
    ] = "update"
    epsilon: Annotated[
        float | None, Option("--epsilon", min=1e-3, max=1e4, help="DP-SGD by Opacus: the promise.", **PANEL)
    ] = None
    delta: Annotated[float, Option("--delta", min=1e-12, max=0.5, help="DP-SGD: how often it may break.", **PANEL)] = (
        1e-5
    )
    sample_rate: Annotated[
        float, Option("--sample-rate", min=1e-9, max=1.0, help="DP-SGD: the batch over all texts.", **PANEL)
    ] = 1.0
    steps: Annotated[int, Option("--steps", min=1, help="DP-SGD: steps that the promise is for.", **PANEL)] = 1
    noise: Annotated[
        float | None, Option("--noise", min=0.0, help="Deviation of Gaussian noise on every number.", **PANEL)
    ] = None
    keep: Annotated[
        float | None, Option("--keep", min=1e-6, max=100.0, help="Per cent of the entries kept.", **PANEL)
    ] = None
    keep_by: Annotated[
        Literal["magnitude", "random"], Option("--keep-by", help="Which entries --keep keeps.", **PANEL)
    ] = "magnitude"
    keep_each: Annotated[
        Literal["tensor", "update"],
        Option("--keep-each", help="What --keep is of: every tensor, or all.", **PANEL),
    ] = "tensor"
    percentile_filter: Annotated[
        bool, Option("--percentile-filter", help="NVFLARE's percentile filter, at its defaults.", **PANEL)
    ] = False
    bits: Annotated[
        Literal["bf16", "fp16", "8", "1"] | None, Option("--bits", help="Round numbers; 1 is the sign.", **PANEL)
    ] = None
    stochastic: Annotated[bool, Option("--stochastic", help="Round to 8 bits by chance.", **PANEL)] = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, before any work.

        Raises:
            DagerError: An option does nothing without another one, or two exclude each other.
        """
        for wrong, advice in (
            (self.clip_each != "update" and self.clip is None, "--clip-each belongs to --clip: give the norm"),
            (self.epsilon is not None and self.clip is None, "--epsilon needs --clip: the largest norm of a text's"),
            (
                self.epsilon is not None and (self.noise is not None or self.clip_each != "update"),
                "--epsilon brings noise and clipping of its own: leave out --noise and --clip-each",
            ),
            (
                self.epsilon is None and (self.delta, self.sample_rate, self.steps) != (1e-5, 1.0, 1),
                "--delta, --sample-rate and --steps belong to --epsilon: give the promise",
            ),
            (
                self.keep is None and (self.keep_by, self.keep_each) != ("magnitude", "tensor"),
                "--keep-by and --keep-each belong to --keep: give the per cent",
            ),
            (self.stochastic and self.bits != "8", "--stochastic belongs to --bits 8"),
        ):
            if wrong:
                raise DagerError(advice)

    def protection(self) -> Protection:
        """What the client does."""
        from dager_tutorial.client.defended import Protection
        from dager_tutorial.client.private import Privacy

        privacy = None
        if self.epsilon is not None and self.clip is not None:
            privacy = Privacy(self.epsilon, self.delta, self.clip, self.sample_rate, self.steps)
        return Protection(self.dropout, privacy, tuple(self._chain()))

    def _chain(self) -> Iterator[Defence]:
        """What is done to the gradients once they are there."""
        from dager_tutorial.client.defenses.clipping import Clipping
        from dager_tutorial.client.defenses.noise import Noise
        from dager_tutorial.client.defenses.pruning import PercentileFilter, Pruning
        from dager_tutorial.client.defenses.rounding import Rounding

        if self.clip is not None and self.epsilon is None:
            yield Clipping(self.clip, self.clip_each)
        if self.noise is not None:
            yield Noise(self.noise)
        if self.keep is not None:
            yield Pruning(self.keep, self.keep_by, self.keep_each)
        if self.percentile_filter:
            yield PercentileFilter()
        if self.bits is not None:
            yield Rounding(TYPES[self.bits], self.stochastic)
