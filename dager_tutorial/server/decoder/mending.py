"""Texts mended by the last block: the neighbour that fits best there takes a text's place, as long as that gains.

Chapter `12_federated`.

Where no gap stands below the signal, a wrong token may stand out more than the true one, and rows behind it stay alike.
The last block's row of a text's end fits worse for every token that is wrong, missing or too many. To ask it costs the
whole network, so it is asked of the likeliest neighbours only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import NamedTuple

import torch

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.edits import Draft, Nearby, nearby
from dager_tutorial.server.decoder.last_block import LastBlock
from dager_tutorial.server.decoder.passage import Prefix
from dager_tutorial.server.decoder.paths import repeats, shared
from dager_tutorial.server.decoder.ranking import Ranking
from dager_tutorial.server.decoder.seen_ends import NO_LIMITS, Limits
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


@dataclass(eq=False)
class _Climb:
    """A text on its way.

    Attributes:
        text: Token ids.
        misfit: As of `Mended`.
        steady: Whether none of its rows has far less evidence than those before; not known before the first step.
        place: Where the last step changed it: the first of two changes that belong together may be half right.
        seen: What it was before.
    """

    text: Prefix
    misfit: float
    steady: bool = False
    place: int | None = None
    seen: set[Prefix] = field(default_factory=set)

    def step(self, text: Prefix, misfit: float) -> None:
        """Go to a neighbour, and how badly it fits."""
        self.place = shared((self.text, text))
        self.seen.add(self.text)
        self.text, self.misfit = text, misfit

    def next(self, near: Nearby, misfits: Mapping[Prefix, float]) -> tuple[Prefix, float]:
        """The neighbour that fits better, and how badly it does; the text itself where there is none.

        Where much drifted the last block hardly tells one token from another. There a neighbour is better, too, that
        fits about as well and gives the rows of the first blocks far more evidence.
        """
        new = [text for text in misfits if text not in self.seen and not repeats(text)]
        least = min(new, key=misfits.__getitem__, default=self.text)
        if misfits.get(least, math.inf) < self.misfit - constants().mended:
            return least, misfits[least]
        alike = [text for text in new if misfits[text] < self.misfit + constants().mended]
        likely = max(alike, key=near.gains.__getitem__, default=self.text)
        if near.gains.get(likely, 0.0) > constants().mended_rows:
            return likely, misfits[likely]
        return self.text, self.misfit


@dataclass(frozen=True)
class Mender:
    """Mends texts.

    Attributes:
        ranking: Weighs extensions by the first blocks.
        last: Tells how well whole texts fit.
        candidates: Tokens that may stand at each position.
        budget: What it may cost.
        thorough: Whether texts may be wrong where no row falls, too, or leave several tokens out: the worst ones of
            which an end is seen.
    """

    ranking: Ranking
    last: LastBlock
    candidates: Candidates
    budget: Budget
    thorough: bool = False

    @torch.no_grad()
    def mended(self, texts: Sequence[Prefix], limits: Limits = NO_LIMITS) -> list[Mended]:
        """What becomes of texts: each stays, where none of its neighbours fits better.

        A text that fits better without its last tokens is mended with and without them.

        Args:
            texts: Token ids.
            limits: How badly they may fit, beside the others of their batch.
        """
        limits = Limits(min(limits.told, constants().end_misfit), min(limits.seen, constants().seen_misfit))
        if not texts or not self.last.tells:
            return [Mended(text, math.inf, told=False) for text in texts]
        wholes = [self._whole(text) for text in texts]
        starts = list(dict.fromkeys([*texts, *wholes]))  # most texts fit best as they are: they are climbed from once
        found = dict(zip(starts, self._climbed(starts, limits), strict=True))
        both = ((found[text], found[whole]) for text, whole in zip(texts, wholes, strict=True))
        return [cut if cut.misfit <= min(limits.seen, full.misfit) else full for full, cut in both]

    def _whole(self, text: Prefix) -> Prefix:
        """The prefix of a text that fits best as a whole one."""
        prefixes = [text[:length] for length in range(2, len(text) + 1)] or [text]
        misfits = self.last.misfits(prefixes)
        return prefixes[misfits.index(min(misfits))]

    def _climbed(self, texts: list[Prefix], limits: Limits) -> list[Mended]:
        """Where texts come to, one token a step, each step to the neighbour that fits best."""
        climbs = [_Climb(text, misfit) for text, misfit in zip(texts, self.last.misfits(texts), strict=True)]
        going = [each for each in climbs if not repeats(each.text)]
        unheld = frozenset(self.candidates.distinct().tolist()).difference(*texts)
        for step in range(constants().mended_steps):
            if step >= constants().mended_blind:
                going = [each for each in going if each.misfit <= limits.seen]
            if not going or self.budget.late:
                break
            gained = self._stepped(going)
            if self.thorough:
                left = [each for each in going if each not in gained]
                gained += self._stepped(self._doubtful(left, limits, unheld), thorough=True, unheld=unheld)
            going = gained
        return [Mended(each.text, each.misfit, told=self._told(each, limits)) for each in climbs]

    def _stepped(
        self, climbs: list[_Climb], *, thorough: bool = False, unheld: frozenset[int] = frozenset()
    ) -> list[_Climb]:
        """Those of some climbs that have a neighbour which fits better, after the step to it."""
        if not climbs or self.budget.late:
            return []
        drafts = [Draft(each.text, each.place) for each in climbs]
        near = nearby(self.ranking, self.candidates, drafts, self.budget, thorough=thorough, unheld=unheld)
        found = iter(self.last.misfits([text for each in near for text in each.gains]))
        gained = []
        for climb, each in zip(climbs, near, strict=True):
            climb.steady = each.steady
            text, misfit = climb.next(each, {text: next(found) for text in each.gains})
            if text != climb.text:
                climb.step(text, misfit)
                gained.append(climb)
        return gained

    def _doubtful(self, climbs: list[_Climb], limits: Limits, unheld: frozenset[int]) -> list[_Climb]:
        """The worst of the texts of which an end is seen, and that are not beyond doubt.

        Beyond doubt is a text that fits well enough to be told, still better as long as tokens must stand somewhere
        that no text holds, and of which no row falls.
        """
        least = limits.told - constants().end_beside / 2 if unheld else limits.told
        seen = [each for each in climbs if each.misfit <= limits.seen]
        doubtful = [each for each in seen if each.misfit > least or not each.steady]
        return nlargest(constants().mended_thoroughly, doubtful, key=lambda each: each.misfit)

    def _told(self, climb: _Climb, limits: Limits) -> bool:
        """Whether a text is told to be whole."""
        return climb.misfit <= limits.told or (climb.steady and self.last.singles_out(climb.text))
