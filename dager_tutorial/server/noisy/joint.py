"""Texts found by the rows of both embeddings alone, all at once (chapter `14_defences`).

A token's row is a sum of the slopes at the places where it stands, in whatever text; a position's is a sum over texts.
Slopes of different texts at one place are alike, so that rows regressed on those of one text put other texts' tokens
into it. Regressed on the slopes of all, they say which token stands where in which text: a few rounds lead from texts
whose ends alone are right to all of them. Ends show because the slope there is the largest, by far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.simulation import Ids
from dager_tutorial.server.constants import constants
from dager_tutorial.server.noisy.account import Account, Entry
from dager_tutorial.server.noisy.climb import shares
from dager_tutorial.server.noisy.deviation import outstanding
from dager_tutorial.server.noisy.matched import Matched


@dataclass(frozen=True)
class Joint:
    """Finds the texts of an update by its embeddings' rows.

    Attributes:
        account: Of the update, no text taken off.
        words: The name of the tokens' gradient.
        positions: That of the positions', of which the first ones may be none.
        tokens: int64, the tokens in question.
        budget: What it may cost.
    """

    account: Account
    words: str
    positions: tuple[str, int]
    tokens: Int[Tensor, " tokens"]
    budget: Budget
    _known: dict[tuple[Ids, int], Float[Tensor, "places width"]] = field(default_factory=dict)

    def run(self) -> list[Entry]:
        """One text more as long as what is left of the rows says where it ends; every time all are made better."""
        entries: list[Entry] = []
        strongest, words, positions = 0.0, *self._left([])
        while (beginnings := self._beginnings(words, positions)) and not self.budget.late:
            matched = self._filter(words)
            scores = matched.scores(beginnings)
            best = int(scores.values.argmax())
            if scores.values[best] <= max(constants().outstanding, constants().weakest_text * strongest):
                break
            strongest = max(strongest, float(scores.values[best]))
            entries = self._settled([*entries, Entry(beginnings[best], int(scores.labels[best]), 1.0)])
            words, positions = self._left(entries)
            self.budget.report("completion", len(entries))
        return entries

    def _filter(self, words: Tensor) -> Matched:
        """The filter of the tokens' rows alone, in which texts have little in common."""
        return Matched(self.account.simulator, {self.words: words}, self.account.deviations)

    def _beginnings(self, words: Tensor, positions: Tensor) -> list[Ids]:
        """What stands at the positions by what is left of the rows, cut at the places that have most."""
        name, first = self.positions
        rows = outstanding(positions, self.account.deviations[name])
        if not len(rows) or rows[-1] < first:
            return []
        slopes = positions[first : int(rows[-1]) + 1]
        text = tuple(self.tokens[shares(words[self.tokens], slopes).argmax(1)].tolist())
        ends = slopes.norm(dim=1).argsort(descending=True)[: constants().starts]
        return [text[: end + 1] for end in ends.tolist()]

    def _settled(self, entries: list[Entry]) -> list[Entry]:
        """The texts once no token moves, or for some rounds no fewer do than did before; weighed anew."""
        fewest, idle = sum(len(entry.tokens) for entry in entries), 0
        while fewest and idle < constants().idle_rounds and not self.budget.late:
            before, entries = entries, self._placed(entries)
            pairs = zip(before, entries, strict=True)
            moved = sum(old != new for one, other in pairs for old, new in zip(one.tokens, other.tokens, strict=True))
            fewest, idle = min(moved, fewest), idle + 1 if moved >= fewest else 0
        return self._weighed(entries)

    def _placed(self, entries: list[Entry]) -> list[Entry]:
        """The texts with the token at every place whose row its slope makes up most."""
        slopes = self._slopes(entries)
        likeliest = self.tokens[shares(self._rows, torch.cat(slopes)).argmax(1)]
        parts = likeliest.split([len(each) for each in slopes])
        return [one._replace(tokens=tuple(part.tolist())) for one, part in zip(entries, parts, strict=True)]

    @property
    def _rows(self) -> Float[Tensor, "tokens width"]:
        return precise(self.account.received[self.words][self.tokens])

    def _slopes(self, entries: Sequence[Entry]) -> list[Tensor]:
        """The texts' slopes, which their weights do not change: of a text that stays as it was they are known."""
        keys = [(each.tokens, each.label) for each in entries]
        fresh = list(dict.fromkeys(key for key in keys if key not in self._known))
        if fresh:
            slopes = self._whole.slopes([tokens for tokens, _ in fresh], [label for _, label in fresh])
            self._known.update(zip(fresh, slopes, strict=True))
        return [self._known[key] for key in keys]

    @cached_property
    def _whole(self) -> Matched:
        return self._filter(self.account.received[self.words])

    def _weighed(self, entries: list[Entry]) -> list[Entry]:
        """The texts with the weights that best explain the rows; of a batch in which all weigh the same, exactly so."""
        pairs = zip(entries, self._slopes(entries), strict=True)
        made = torch.stack([self._made(entry, slopes).flatten() for entry, slopes in pairs])
        gram, products = made @ made.T, made @ self._rows.flatten()
        weights = torch.linalg.lstsq(gram.cpu(), products.cpu()[:, None]).solution[:, 0]
        if bool(((weights * len(weights) - 1).abs() < constants().even_weights).all()):
            weights = torch.full_like(weights, 1 / len(weights))
        return [entry._replace(weight=float(weight)) for entry, weight in zip(entries, weights, strict=True)]

    def _made(self, entry: Entry, slopes: Float[Tensor, "places width"]) -> Float[Tensor, "tokens width"]:
        """The rows that a text makes."""
        stands = self.tokens[:, None] == torch.tensor(entry.tokens, device=self.tokens.device)
        return stands.to(slopes) @ slopes

    def _left(self, entries: list[Entry]) -> tuple[Float[Tensor, "vocabulary width"], Float[Tensor, "places width"]]:
        """What texts leave of the rows of both embeddings."""
        name, first = self.positions
        words, positions = (self.account.received[each].float().clone() for each in (self.words, name))
        for entry, slopes in zip(entries, self._slopes(entries), strict=True):
            words[self.tokens] -= (entry.weight * self._made(entry, slopes)).float()
            positions[first : first + len(slopes)] -= (entry.weight * slopes).float()
        return words, positions
