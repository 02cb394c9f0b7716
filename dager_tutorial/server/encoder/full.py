"""Whole texts where no direction is free: the search by leverage, and the last block as the proof.

Chapters `08_encoder_recovery` and `11_limits`.

With as many rows as the model is wide nothing lies outside block 0's attention-output span any more. A true row still
leans little on the weak directions, so that the relaxation goes on with these, each over its strength, in the place of
equations that must vanish (`FirstBlock.mixture`). Its weights settle less, and its texts may run on too far: they are
cut where their rows lean on the weak directions least. What a text says is then tested by the last block.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.confirmation import LastConfirmer
from dager_tutorial.server.encoder.search import Solve, TextSearch, first_of
from dager_tutorial.server.encoder.seeds import Seed, companions, known_tokens
from dager_tutorial.server.encoder.tables import Text


@dataclass(frozen=True)
class FullSearch(TextSearch):
    """Finds texts seed by seed until the last block's rank is explained.

    Where found texts can be taken off the update it ends early: what is left is less full.
    """

    def _phases(self, found: Mapping[Text, float]) -> Iterator[tuple[Iterable[Seed], Solve]]:
        """Seeds and how to solve for their texts, those with companions first."""
        yield self._company(operator.le), self.quickly
        yield (Seed(*pair) for pair in self.clues.order), self.alone

    def _over(self, texts: Iterable[Text]) -> bool:
        """Whether all texts are found, or enough of them, or the time is spent."""
        found = list(texts)
        assert isinstance(self.confirmer, LastConfirmer)
        enough = self.hand_over and sum(map(len, found)) >= constants().taken_off * self.confirmer.adapter.hidden_size
        return enough or self.budget.late or len(found) >= self.confirmer.rank

    def _patience(self, found: Mapping[Text, float]) -> int:
        """How many seeds in a row may lead to nothing new."""
        return constants().stalled if self.hand_over and found else constants().full_failures

    def quickly(self, seed: Seed) -> Text | None:
        """The text of a seed and its companions.

        Args:
            seed: One that has companions.
        """
        return self._read(companions(self.clues, seed) | known_tokens(self.clues, seed))

    def alone(self, seed: Seed) -> Text | None:
        """The text in which a seed stands, from nothing but the seed.

        Args:
            seed: Any pair that passes the filter.
        """
        return self._read(known_tokens(self.clues, seed))

    def _read(self, known: Mapping[int, int]) -> Text | None:
        """The text around what is known, cut at its likeliest ends and mended."""
        if self.relaxation is None:
            text = self._likeliest(known)
        else:
            solution = self.relaxation.solve(self._narrow(known), constants().equations)
            text = () if solution is None else solution.text
        return first_of(self._mended(cut) for cut in self._cuts(text))

    def _cuts(self, text: Text) -> list[Text]:
        """The text up to where its rows lean on the weak directions least, the likeliest first."""
        if self.polish is None or len(text) < 2:
            return [text]
        shorter = [text[:length] for length in range(2, len(text) + 1)]
        return sorted(shorter, key=self._mean_energy)[: constants().cuts]

    def _mean_energy(self, text: Text) -> float:
        assert self.polish is not None
        itself = torch.tensor(text[:1], device=self.clues.tokens.device)
        return float(self.polish.energies(text, 0, itself)) / len(text)
