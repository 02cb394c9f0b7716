"""Strings of tokens that a text may leave out, several in a row, grown where they would stand.

Chapter `12_federated`.

Where a text's rows are weak a search may jump over some of them, and go on with the rows behind, which look much like
those that it would have come to. One of the tokens put back hardly helps the others; all of them do. Tokens that the
embedding's rows name and no text holds are likelier than the rest: they must stand somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.passage import Cache, Prefix
from dager_tutorial.server.decoder.ranking import Chance, Ranking
from dager_tutorial.server.token_filter import Candidates


@dataclass(frozen=True)
class Missing:
    """Grows strings that may be missing.

    Attributes:
        ranking: Weighs extensions by the first blocks.
        candidates: Tokens that may stand at each position.
        chance: How badly false extensions fit.
        unheld: int64, tokens that no text holds.
    """

    ranking: Ranking
    candidates: Candidates
    chance: Chance
    unheld: Int[Tensor, " tokens"]

    def strings(self, cache: Cache, first: int, place: int) -> list[Prefix]:
        """Strings of two tokens and more that may stand behind a prefix.

        Args:
            cache: Keys and values of the prefix.
            first: Its first token.
            place: How many tokens it has.
        """
        strings: list[Prefix] = [()]
        totals = self.unheld.new_zeros(1, dtype=torch.float32)
        found: list[Prefix] = []
        for position in range(place, min(place + constants().missing, self.ranking.passage.adapter.max_positions)):
            tokens = self.candidates.at(position)
            if not len(tokens):
                break
            begun = tokens.new_full((len(strings),), first)
            rows = self.ranking.promising(cache, begun, position, tokens, self.chance)
            evidence = totals[rows.places] + self._evidence(self.ranking.misfits(rows), rows.tokens)
            best = evidence.topk(min(constants().missing_beam, len(evidence))).indices
            rows, totals = rows.take(best), evidence[best]
            strings = rows.named(strings)
            found += strings if position > place else []
            cache = self.ranking.passage.grown(cache, rows)
        return found

    def _evidence(self, misfits: Float[Tensor, "rows taps"], tokens: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The evidence of extensions, more of it where their token must stand somewhere."""
        return self.chance.evidence(misfits) + constants().unheld * torch.isin(tokens, self.unheld)
