"""Texts found by the rows of both embeddings alone, all at once (chapter `14_defences`).

A token's row is a sum of the slopes at the places where it stands, in whatever text; a position's is a sum over texts.
Slopes of different texts at one place are alike, so that rows regressed on those of one text put other texts' tokens
into it. Regressed on the slopes of all, they say which token stands where in which text: a few rounds lead from texts
whose ends alone are right to all of them. Ends show because the slope there is the largest, by far.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
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
        while not self.budget.late and (ending := self._ending(entries)) is not None:
            entries = self._settled([*entries, ending])
            self.budget.report("completion", len(entries))
        return self.exchanged(entries)

    def _ending(self, entries: list[Entry]) -> Entry | None:
        """The beginning of what is left whose last slope explains most of its position's row, if that is a text's end.

        Only an end's slope is that large, whatever stands there; what a text leaves at its own end is far smaller.
        """
        words, positions = self._left(entries)
        beginnings = self._beginnings(words, positions)
        if not beginnings:
            return None
        ends = torch.stack([self._ends(beginnings, label) for label in range(self.account.simulator.head.classes)])
        left = torch.stack([positions[len(each) - 1] for each in beginnings])
        products, lengths = (ends * left).sum(2), ends.norm(dim=2)
        values = products / lengths / self.account.deviations[self.positions[0]]
        label, best = divmod(int(values.argmax()), len(beginnings))
        weight = float(products[label, best] / lengths[label, best].square())
        usual = sum(each.weight for each in entries) / max(len(entries), 1)
        if values[label, best] <= constants().outstanding or weight <= constants().weakest_end * usual:
            return None
        return Entry(beginnings[best], label, 1.0)

    def _ends(self, texts: list[Ids], label: int) -> Float[Tensor, "texts width"]:
        """The last slopes of texts."""
        return torch.stack([each[-1] for each in self._filter.slopes(texts, [label] * len(texts))])

    def _beginnings(self, words: Tensor, positions: Tensor) -> list[Ids]:
        """What stands at the positions by what is left of the rows, cut at the places that have most."""
        rows = outstanding(positions, self.account.deviations[self.positions[0]])
        if not len(rows):
            return []
        slopes = positions[: int(rows[-1]) + 1]
        text = tuple(self.tokens[shares(words, slopes).argmax(1)].tolist())
        ends = slopes.norm(dim=1).argsort(descending=True)[: constants().endings]
        return [text[: end + 1] for end in ends.tolist()]

    def _settled(self, entries: list[Entry]) -> list[Entry]:
        """The texts once no token moves, or for some rounds no fewer do than did before; weighed anew."""
        fewest, idle = sum(len(entry.tokens) for entry in entries), 0
        while fewest and idle < constants().idle_rounds and not self.budget.late:
            before, entries = entries, self.placed(entries)
            pairs = zip(before, entries, strict=True)
            moved = sum(old != new for one, other in pairs for old, new in zip(one.tokens, other.tokens, strict=True))
            fewest, idle = min(moved, fewest), idle + 1 if moved >= fewest else 0
        return self._weighed(entries)

    def placed(self, entries: list[Entry]) -> list[Entry]:
        """The texts with the token at every place whose row its slope makes up most, so that every token has a place.

        A token that a row names stands somewhere: where there are places enough, none is left out.

        Args:
            entries: At least one.
        """
        slopes = self._slopes(entries)
        found = shares(self._rows, torch.cat(slopes))
        likeliest = found.argmax(1)
        if len(found) >= len(self.tokens):
            behind = (found.max(1, keepdim=True).values - found).T.cpu().numpy()
            tokens, places = (torch.from_numpy(each).to(likeliest) for each in linear_sum_assignment(behind))
            likeliest[places] = tokens
        parts = self.tokens[likeliest].split([len(each) for each in slopes])
        return [one._replace(tokens=tuple(part.tolist())) for one, part in zip(entries, parts, strict=True)]

    def exchanged(self, entries: list[Entry]) -> list[Entry]:
        """The texts after two of them have changed tokens at one place, as long as less is left of the rows.

        Rounds that move every token alone never leave such a pair: each slope fits what stands in the other text.

        Args:
            entries: Of tokens in question, with their weights.
        """
        least, better = self._square(entries), True
        while better:
            better = False
            for changed in self._exchanges(entries):
                if self.budget.late:
                    return entries
                if self._square(changed) < least:
                    both = (changed, self._settled(changed))
                    least, entries = min(((self._square(each), each) for each in both), key=lambda one: one[0])
                    better = True
                    break
        return entries

    def told(self, entries: list[Entry]) -> bool:
        """Whether every likely exchange leaves more of the rows by more than noise makes.

        Each text alone may fit better than its neighbours although two of them have changed tokens. What an exchange
        of true texts leaves more, a square, has the deviation of the noise times twice its root.

        Args:
            entries: Of tokens in question, with the weights they have in their batch.
        """
        least = self._square(entries) + (2 * constants().apart) ** 2
        return all(self._square(changed) >= least for changed in self._exchanges(entries))

    def _exchanges(self, entries: list[Entry]) -> list[list[Entry]]:
        """The texts with two tokens of one place exchanged, for the places where that costs the shares least."""
        if len(entries) < 2:
            return []
        found = shares(self._rows, torch.cat(self._slopes(entries)))
        parts = found.split([len(each.tokens) for each in entries])
        columns = [torch.searchsorted(self.tokens, self.tokens.new_tensor(each.tokens)) for each in entries]
        costs = []
        for (one, first), (other, second) in itertools.combinations(enumerate(zip(parts, columns, strict=True)), 2):
            for place in range(min(len(first[1]), len(second[1]))):
                here, there = int(first[1][place]), int(second[1][place])
                rows = first[0][place], second[0][place]
                if here != there:
                    cost = rows[0][here] - rows[0][there] + rows[1][there] - rows[1][here]
                    costs.append((float(cost), one, other, place))
        return [_exchange(entries, *where) for _, *where in sorted(costs)[: constants().neighbours]]

    def _square(self, entries: list[Entry]) -> float:
        """The squared length of what texts leave of the rows of both embeddings, in units of the noise."""
        names = (self.words, self.positions[0])
        parts = zip(names, self._left(entries), strict=True)
        return sum(float(part.square().sum()) / self.account.deviations[name] ** 2 for name, part in parts)

    @cached_property
    def _rows(self) -> Float[Tensor, "tokens width"]:
        return precise(self.account.received[self.words][self.tokens])

    def _slopes(self, entries: Sequence[Entry]) -> list[Tensor]:
        """The texts' slopes, which their weights do not change: of a text that stays as it was they are known."""
        keys = [(each.tokens, each.label) for each in entries]
        fresh = list(dict.fromkeys(key for key in keys if key not in self._known))
        if fresh:
            slopes = self._filter.slopes([tokens for tokens, _ in fresh], [label for _, label in fresh])
            self._known.update(zip(fresh, slopes, strict=True))
        return [self._known[key] for key in keys]

    @cached_property
    def _filter(self) -> Matched:
        received = {self.words: self.account.received[self.words]}
        return Matched(self.account.simulator, received, self.account.deviations)

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

    def _left(self, entries: list[Entry]) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "places width"]]:
        """What texts leave of the tokens' rows, and of the positions' from the first that texts have."""
        name, first = self.positions
        words, positions = self._rows.clone(), precise(self.account.received[name][first:]).clone()
        for entry, slopes in zip(entries, self._slopes(entries), strict=True):
            words -= entry.weight * self._made(entry, slopes)
            positions[: len(slopes)] -= entry.weight * slopes
        return words, positions


def _exchange(entries: list[Entry], one: int, other: int, place: int) -> list[Entry]:
    """Texts of which two have changed tokens at a place."""
    changed = list(entries)
    for own, their in ((one, other), (other, one)):
        tokens = list(entries[own].tokens)
        tokens[place] = entries[their].tokens[place]
        changed[own] = entries[own]._replace(tokens=tuple(tokens))
    return changed
