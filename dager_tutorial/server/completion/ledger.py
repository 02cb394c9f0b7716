"""The account of an update: the texts that are entered, what they add up to, what remains (chapter `09_completion`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP_OUTPUT, Tap
from dager_tutorial.server.completion.counting import Counts, count
from dager_tutorial.server.completion.reduction import Reduction, reduction_of, shares
from dager_tutorial.server.completion.simulation import Factors, Ids, Simulator, of_logits
from dager_tutorial.server.evidence import Evidence


class Ledger:
    """Texts of a classification whose terms of the sum are known.

    Args:
        simulator: Repeats the client's step.
        evidence: What the whole update says.
        received: The shared gradients by the update's names, as they arrived.
    """

    def __init__(self, simulator: Simulator, evidence: Evidence, received: Mapping[str, Tensor]) -> None:
        self.simulator = simulator
        self.received = {name: received[name] for name in simulator.shared}
        self.tap, self.reduction = _taken_apart(evidence)
        self.texts: tuple[Ids, ...] = ()
        self.counts: Counts | None = None
        self._before: tuple[tuple[Ids, ...], Counts | None] = (), None
        self._factors: dict[Ids, Factors] = {}

    @property
    def complete(self) -> bool:
        """Whether the counts of the texts add up to the size of the batch."""
        return self.counts is not None and self.counts.complete

    @property
    def size(self) -> int | None:
        """The size of the batch, as far as the counts tell."""
        return None if self.counts is None else self.counts.size

    def enter(self, texts: Sequence[Ids]) -> bool:
        """Enter those texts that are in the batch for certain.

        The text's activation and the gradient behind it must both lie in the map's gradient, and its share of the sum
        must be a whole number of copies of it.

        Args:
            texts: Token ids.

        Returns:
            Whether any was entered that was not before.
        """
        fresh = [text for text in dict.fromkeys(texts) if text not in self.texts]
        if self.reduction is None or not fresh:
            return False
        together = self._kept((*self.texts, *fresh), self.reduction)
        if not set(together) - set(self.texts):
            return False
        found = shares(self.reduction, self._all(together))
        counts = count(found.gradients, self._all(together).chances, least=max(self.reduction.least, len(together)))
        if counts is None:
            return False
        self._before = self.texts, self.counts
        self.texts, self.counts = together, counts
        return True

    def undo(self) -> None:
        """Strike out what was entered last."""
        self.texts, self.counts = self._before

    def _kept(self, texts: tuple[Ids, ...], reduction: Reduction) -> tuple[Ids, ...]:
        """Those of the texts that lie in the map's gradient."""
        self._ask([text for text in texts if text not in self._factors])
        inside = shares(reduction, self._all(texts)).inside.tolist()
        return tuple(text for text, held in zip(texts, inside, strict=True) if held)

    def _ask(self, texts: list[Ids]) -> None:
        """Compute the factors of texts that were not asked for before."""
        if texts and self.tap is not None:
            found = self.simulator.factors(texts, self.tap)
            parts = zip(found.inputs.split(1), found.slopes.split(1), found.chances.split(1), strict=True)
            self._factors |= zip(texts, (Factors(*part) for part in parts), strict=True)

    def _all(self, texts: Sequence[Ids]) -> Factors:
        """The factors of texts."""
        records = [self._factors[text] for text in texts]
        stacked = (torch.cat([getattr(one, name) for one in records]) for name in ("inputs", "slopes", "chances"))
        return Factors(*stacked)

    def rest(self) -> dict[str, Tensor]:
        """What remains of the update when every text that was entered is simulated and taken off.

        Returns:
            By the update's names, in float32 or, where the update has it, float64.
        """
        rest = {name: tensor.to(_wide(tensor.dtype), copy=True) for name, tensor in self.received.items()}
        if self.counts is not None:
            self.simulator.subtract(rest, self.texts, of_logits(self.counts.gradients))
        return rest

    def share(self, rest: Mapping[str, Tensor]) -> float:
        """How large what remains is, as a share of the update: norms over all shared parameters.

        Args:
            rest: What remains.
        """
        return norm(rest) / norm(self.received)


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The norm of all numbers together.

    Args:
        tensors: By name.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    5.0
    """
    return math.hypot(*(torch.linalg.vector_norm(tensor.float()).item() for tensor in tensors.values()))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to subtract in."""
    return torch.promote_types(dtype, torch.float32)


def _taken_apart(evidence: Evidence) -> tuple[Tap | None, Reduction | None]:
    """A map of the last block whose gradient has one term a text, and that gradient taken apart."""
    adapter = evidence.adapter
    for kind in (ATTENTION_OUTPUT, MLP_OUTPUT):
        tap = adapter.tap(adapter.num_blocks - 1, kind)
        gradient = tap.gradient(evidence.gradients)
        if gradient is not None:
            return tap, reduction_of(gradient, torch.finfo(evidence.precision).eps)
    return None, None
