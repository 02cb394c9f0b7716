"""Texts mended by the last block: the neighbour that fits best there takes a text's place, as long as that gains.

Chapter `12_federated`.

Where no gap stands below the signal, a wrong token may stand out more than the true one, and rows behind it stay alike.
The last block's row of a text's end fits worse for every token that is wrong, missing or too many. To ask it costs the
whole network, so it is asked of the likeliest neighbours only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.edits import nearby
from dager_tutorial.server.decoder.last_block import LastBlock
from dager_tutorial.server.decoder.passage import Prefix
from dager_tutorial.server.decoder.ranking import Ranking
from dager_tutorial.server.token_filter import Candidates


class Mended(NamedTuple):
    """A text that none of its neighbours beats.

    Attributes:
        text: Token ids.
        misfit: How badly it fits, as `End.misfit`.
        told: Whether it is told to be whole: by how well it fits, or where none of its rows has far less evidence than
            those before, by how much better than its prefixes.
    """

    text: Prefix
    misfit: float
    told: bool


@dataclass(frozen=True)
class Mender:
    """Mends texts.

    Attributes:
        ranking: Weighs extensions by the first block.
        last: Tells how well whole texts fit.
        candidates: Tokens that may stand at each position.
        budget: What it may cost.
    """

    ranking: Ranking
    last: LastBlock
    candidates: Candidates
    budget: Budget

    @torch.no_grad()
    def mended(self, texts: Sequence[Prefix]) -> list[Mended]:
        """What becomes of texts: each stays, where none of its neighbours fits better.

        A text that fits better without its last tokens is mended with and without them.

        Args:
            texts: Token ids.
        """
        if not texts or not self.last.tells:
            return [Mended(text, math.inf, told=False) for text in texts]
        wholes = [self._whole(text) for text in texts]
        starts = list(dict.fromkeys([*texts, *wholes]))  # most texts fit best as they are: they are climbed from once
        found = dict(zip(starts, self._climbed(starts), strict=True))
        both = ((found[text], found[whole]) for text, whole in zip(texts, wholes, strict=True))
        return [cut if cut.misfit <= min(constants().end_misfit, full.misfit) else full for full, cut in both]

    def _whole(self, text: Prefix) -> Prefix:
        """The prefix of a text that fits best as a whole one."""
        prefixes = [text[:length] for length in range(2, len(text) + 1)] or [text]
        misfits = self.last.misfits(prefixes)
        return prefixes[misfits.index(min(misfits))]

    def _climbed(self, texts: list[Prefix]) -> list[Mended]:
        """Where texts come to, one token a step, each step to the neighbour that fits best."""
        best, misfits, steady = list(texts), self.last.misfits(texts), set[int]()
        going = list(range(len(texts)))
        while going and not self.budget.late:
            near = nearby(self.ranking, self.candidates, [best[index] for index in going], self.budget)
            found = iter(self.last.misfits([text for each in near for text in each.texts]))
            gained = []
            for index, each in zip(going, near, strict=True):
                misfit, text = min(((next(found), text) for text in each.texts), default=(math.inf, ()))
                if misfit < misfits[index] - constants().mended:
                    best[index], misfits[index] = text, misfit
                    gained.append(index)
                elif each.steady:
                    steady.add(index)
            going = gained
        told = [
            misfit <= constants().end_misfit or (index in steady and self.last.singles_out(text))
            for index, (text, misfit) in enumerate(zip(best, misfits, strict=True))
        ]
        return [Mended(*each) for each in zip(best, misfits, told, strict=True)]
