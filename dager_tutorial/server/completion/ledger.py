"""The account of an update: the texts that are entered, what they add up to, what remains (chapter `09_completion`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP_OUTPUT, Tap
from dager_tutorial.server.completion.counting import Counts, count
from dager_tutorial.server.completion.reduction import Reduction, reduction_of, shares, shares_of_all
from dager_tutorial.server.completion.remainder import Remainder, remainder_of
from dager_tutorial.server.completion.simulation import Factors, Ids, Simulator, of_logits
from dager_tutorial.server.constants import constants
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
        self.received = received
        self.tap = _read_tap(evidence)
        self.eps = constants().grid_precision if evidence.bits else torch.finfo(evidence.precision).eps
        self.part = evidence.filled(self.tap) if evidence.pruned else None
        whole = None if evidence.pruned else self.tap.gradient(evidence.gradients)
        gradient = whole if self.part is None else self.part.values
        self.gradient = torch.zeros(0, 0, dtype=torch.float64) if gradient is None else gradient.cpu()
        self.reduction = reduction_of(self.gradient, self.eps) if self.gradient.numel() else None
        self.texts: tuple[Ids, ...] = ()
        self.counts: Counts | None = None
        self._factors: dict[Ids, Factors] = {}

    @property
    def complete(self) -> bool:
        """Whether the counts of the texts add up to the size of the batch."""
        return self.counts is not None and self.counts.complete

    @property
    def size(self) -> int | None:
        """The size of the batch, as far as the counts tell."""
        return None if self.counts is None else self.counts.size

    @property
    def classes(self) -> dict[Ids, tuple[int, ...]]:
        """The labels of each text, one a copy."""
        if self.counts is None:
            return {}
        times = zip(self.texts, self.counts.labels.tolist(), strict=True)
        return {text: tuple(label for label, n in enumerate(each) for _ in range(n)) for text, each in times}

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
        together, gradients = self._weighed((*self.texts, *fresh), self.reduction)
        if not set(together) - set(self.texts):
            return False
        counts = count(gradients, self._all(together).chances, least=max(self.reduction.least, len(together)))
        if counts is None:
            return False
        self.texts, self.counts = together, counts
        return True

    def _weighed(self, texts: tuple[Ids, ...], reduction: Reduction) -> tuple[tuple[Ids, ...], Tensor]:
        """Those of the texts that are in the batch, and the gradients in their logits."""
        self._ask([text for text in texts if text not in self._factors])
        factors = self._all(texts)
        together = shares_of_all(self.gradient, factors, self.eps)
        if together is not None:  # none is missing; what adds nothing is not there
            sizes = together.norm(dim=1)
            inside, found = sizes > self.eps**0.5 / 10 * sizes.max(), together
        else:
            alone = shares(reduction, factors)
            inside, found = alone.inside, alone.gradients
        return tuple(text for text, held in zip(texts, inside.tolist(), strict=True) if held), found[inside]

    def _ask(self, texts: list[Ids]) -> None:
        """Compute the factors of texts that were not asked for before."""
        if texts:
            found = self.simulator.factors(texts, self.tap)
            if self.part is not None:
                inputs, outputs = self.part.inputs.cpu(), self.part.outputs.cpu()
                found = Factors(found.inputs[:, inputs], found.slopes[..., outputs], found.chances)
            parts = zip(found.inputs.split(1), found.slopes.split(1), found.chances.split(1), strict=True)
            self._factors |= zip(texts, (Factors(*part) for part in parts), strict=True)

    def _all(self, texts: Sequence[Ids]) -> Factors:
        """The factors of texts."""
        records = [self._factors[text] for text in texts]
        stacked = (torch.cat([getattr(one, name) for one in records]) for name in ("inputs", "slopes", "chances"))
        return Factors(*stacked)

    def up_to_scale(self, texts: Sequence[Ids]) -> Counts | None:
        """Labels and copies of texts, where the map's gradient may have been multiplied by any number.

        A text that occurs with one label pulls this logit up and all others down, and with several copies the more.

        Args:
            texts: Token ids, each once; all that there are.

        Returns:
            None where the texts do not add up to the map's gradient. Only a simulation proves the others.
        """
        self._ask([text for text in texts if text not in self._factors])
        factors = self._all(texts)
        gradients = shares_of_all(self.gradient, factors, self.eps)
        if gradients is None:
            return None
        label = gradients.argmin(1, keepdim=True)
        each = (gradients.gather(1, label) / (factors.chances.gather(1, label) - 1)).clamp(min=0)
        copies = (each / each.min().clamp(min=1e-300)).round().clamp(max=constants().most_copies).long()
        labels = torch.zeros_like(gradients, dtype=torch.long).scatter(1, label, copies)
        return Counts(int(labels.sum()), labels, factors.chances)

    def remainder(self) -> Remainder:
        """What remains of the update when every text that was entered is simulated and taken off.

        Raises:
            ValueError: No text was entered.
        """
        if self.counts is None:
            raise ValueError("nothing was entered that could be taken off")
        return remainder_of(self.simulator, self.received, self.texts, of_logits(self.counts.gradients))


def _read_tap(evidence: Evidence) -> Tap:
    """A map of the last block whose gradient has one term a text: the attention's output, or else the MLP's."""
    adapter, last = evidence.adapter, evidence.adapter.num_blocks - 1
    taps = (adapter.tap(last, ATTENTION_OUTPUT), adapter.tap(last, MLP_OUTPUT))
    return next((tap for tap in taps if set(tap.parameters) & set(evidence.gradients)), taps[0])
