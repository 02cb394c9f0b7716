"""Texts found by the rows of both embeddings alone, all at once (chapter `14_defences`).

A token's row is a sum of the slopes at the places where it stands, in whatever text; a position's is a sum over texts.
Slopes of different texts at one place are alike, so that rows regressed on those of one text put other texts' tokens
into it. Regressed on the slopes of all, they say which token stands where in which text: a few rounds lead from texts
whose ends alone are right to all of them. Ends show because the slope there is the largest, by far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from dager_tutorial.server.deviation import outstanding
from dager_tutorial.server.noisy.account import Account, Entry
from dager_tutorial.server.noisy.climb import likeness, shares
from dager_tutorial.server.noisy.matched import Matched
from dager_tutorial.server.noisy.moves import Changes, exchanged_beginnings
from dager_tutorial.server.odds import chance_quantile


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
        """One text more as long as what is left of the rows says where it ends; every time all are made better.

        While texts are wrong another may leave more of the rows for a while; where many do, the best are taken.
        """
        entries, best, idle = list[Entry](), (math.inf, list[Entry]()), 0
        while not self.budget.late and idle < constants().idle_rounds and (ending := self._ending(entries)) is not None:
            before, entries = len(entries), self._distinct(self._settled([*entries, ending]))
            self.budget.report("completion", len(entries))
            square = self._square(entries)
            best, idle = ((square, entries), 0) if square < best[0] else (best, idle + 1)
            if len(entries) == before:
                break
        return self._weighty(self.mended(self._weighty(best[1])))

    def _ending(self, entries: list[Entry]) -> Entry | None:
        """The beginning of what is left whose last slope explains most of its position's row, if that is a text's end.

        Only an end's slope is that large, whatever stands there; what a text leaves at its own end is far smaller.
        """
        words, positions = self._left(entries)
        beginnings = self._beginnings(words, positions)
        if not beginnings:
            return None
        ends = torch.stack([self._ends(beginnings, label) for label in range(self.account.simulator.head.classes)])
        places = [len(each) - 1 for each in beginnings]
        left = positions[places]
        ends = ends * self._sent[1][places]
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
        found = shares(words, slopes) if self._gaps is None else likeness(words, slopes)
        text = tuple(self.tokens[found.argmax(1)].tolist())
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

    def _distinct(self, entries: list[Entry]) -> list[Entry]:
        """The texts without what rounds have made of two that are one, which is weighed once."""
        distinct = list({(each.tokens, each.label): each for each in entries}.values())
        return entries if len(distinct) == len(entries) else self._weighed(distinct)

    def _weighty(self, entries: list[Entry]) -> list[Entry]:
        """The texts that weigh anything: while the others were wrong one may have stood in for a part of them."""
        usual = max((each.weight for each in entries), default=0.0)
        weighty = [each for each in entries if each.weight > constants().weakest_end * usual]
        return entries if len(weighty) == len(entries) else self._weighty(self._settled(weighty))

    def placed(self, entries: list[Entry]) -> list[Entry]:
        """The texts with the token at every place whose row its slope makes up most, so that every token has a place.

        A token that a row names stands somewhere: where there are places enough, none is left out.

        Args:
            entries: At least one.
        """
        slopes = self._slopes(entries)
        found = shares(self._rows, torch.cat(slopes), self._gaps)
        likeliest = found.argmax(1)
        if len(found) >= len(self.tokens):
            behind = (found.max(1, keepdim=True).values - found).T.cpu().numpy()
            tokens, places = (torch.from_numpy(each).to(likeliest) for each in linear_sum_assignment(behind))
            likeliest[places] = tokens
        parts = self.tokens[likeliest].split([len(each) for each in slopes])
        return [one._replace(tokens=tuple(part.tolist())) for one, part in zip(entries, parts, strict=True)]

    def mended(self, entries: list[Entry]) -> list[Entry]:
        """The texts after the likeliest changes, as long as they leave less of the rows.

        Rounds that move every token alone never leave texts that have exchanged tokens: each slope fits what stands in
        the other text.

        Args:
            entries: Of tokens in question, with their weights.
        """
        least, better = self._square(entries), True
        while better and not self.budget.late:
            better = False
            for changed in self._changes(entries, least):
                if self.budget.late:
                    break
                if self._square(changed) < least:
                    both = (changed, self._settled(changed))
                    least, entries = min(((self._square(each), each) for each in both), key=lambda one: one[0])
                    better = True
                    break
        return entries

    def _changes(self, entries: list[Entry], square: float) -> Iterator[list[Entry]]:
        """Changes that may leave less of the rows: single ones, and beginnings where more than noise is left."""
        size = sum(float(each.sum()) for each in self._sent)
        if square > size or not self.account.noise.is_exact:
            yield from self._single(entries)
        if square > size + chance_quantile(constants().miss_rate) * math.sqrt(2 * size):
            yield from exchanged_beginnings(entries)

    def told(self, entries: list[Entry]) -> bool:
        """Whether every likely change leaves more of the rows by more than noise makes.

        Each text alone may fit better than its neighbours although two of them have changed tokens. What an exchange
        of true texts leaves more, a square, has the deviation of the noise times twice its root.

        Args:
            entries: Of tokens in question, with the weights they have in their batch.
        """
        least = self._square(entries) + (2 * constants().apart) ** 2
        return all(self._square(changed) >= least for changed in self._single(entries))

    def _single(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        """The likeliest changes at one place."""
        changes = Changes(entries, self._slopes(entries), self._left(entries)[0], self.tokens)
        yield from changes.exchanges()
        yield from changes.replacements()

    def _square(self, entries: list[Entry]) -> float:
        """The squared length of what texts leave of the rows of both embeddings, in units of the noise."""
        names = (self.words, self.positions[0])
        parts = zip(names, self._left(entries), strict=True)
        return sum(float(part.square().sum()) / self.account.deviations[name] ** 2 for name, part in parts)

    @cached_property
    def _rows(self) -> Float[Tensor, "tokens width"]:
        return precise(self.account.received[self.words][self.tokens])

    @cached_property
    def _sent(self) -> tuple[Tensor, Tensor]:
        """Which entries of the rows were sent, as ones and zeros: of the tokens', and of the positions'."""
        name, first = self.positions
        rows = self.account.received[self.words][self.tokens], self.account.received[name][first:]
        sent = [(each, self.account.noise.sent(each)) for each in rows]
        words, positions = (torch.ones_like(each) if kept is None else kept.to(each) for each, kept in sent)
        return words, positions

    @property
    def _gaps(self) -> Tensor | None:
        """Which entries of the tokens' rows were sent; None where all were."""
        sent = self._sent[0]
        return None if bool(sent.all()) else sent

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
        made = torch.stack([(self._made(entry, slopes) * self._sent[0]).flatten() for entry, slopes in pairs])
        gram, products = made @ made.T, made @ self._rows.flatten()
        weights = torch.linalg.lstsq(gram.cpu(), products.cpu()[:, None]).solution[:, 0]
        if self.account.simulator.head.classes == 2 and bool((weights < 0).any()):  # the other class has that sign
            wrong = (weights < 0).tolist()
            return self._weighed(
                [each._replace(label=each.label ^ turned) for each, turned in zip(entries, wrong, strict=True)]
            )
        relative = weights * len(weights)
        even = abs(float(relative.mean()) - 1) < constants().even_weights and bool((relative > 0.5).all())
        if even:
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
        return words * self._sent[0], positions * self._sent[1]
