"""The texts of an update that holds more than their gradients: found, explained away, then all of it judged.

Chapter `14_defences`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.simulation import Ids
from dager_tutorial.server.constants import constants
from dager_tutorial.server.noisy.account import Account, Entry
from dager_tutorial.server.noisy.climb import Climb, Text
from dager_tutorial.server.noisy.joint import Joint
from dager_tutorial.server.outcome import FoundText, Outcome
from dager_tutorial.status import Certainty, Confirmation, Status


@dataclass
class Search:
    """The texts of an update, found one after the other.

    Attributes:
        account: What is left of the update.
        tokens: int64, the tokens in question.
        budget: What it may cost.
        entries: What was found.
        certain: For each whether the filter tells it from every neighbour.
    """

    account: Account
    tokens: Int[Tensor, " tokens"]
    budget: Budget
    entries: list[Entry] = field(default_factory=list)
    certain: list[bool] = field(default_factory=list)

    @cached_property
    def joint(self) -> Joint | None:
        """The search by the rows of embeddings; None where those of positions were not shared."""
        adapter = self.account.simulator.adapter
        words = self.account.name_of(adapter.first_input.tokens)
        table, first = adapter.position_table or (None, 0)
        positions = None if table is None else self.account.name_of(table)
        if words is None or positions is None:
            return None
        return Joint(self.account, words, (positions, first), self.tokens, self.budget)

    def by_rows(self) -> bool:
        """Find texts by the rows of embeddings; whether they explain all that was sent, and exactly."""
        if self.joint is not None:
            self.entries = self.joint.run()
            self.account.left_by(self.entries)
            if self.account.noise.is_exact:
                self._settle()  # what weighs nothing would explain nothing, and be called proven beside what does
        proven = bool(self.entries) and self.account.noise.is_exact and self.account.is_noise()
        self.certain = [True] * len(self.entries) if proven else []
        return proven

    def run(self, starts: Callable[[], list[Ids]]) -> None:
        """Find texts by the rows of embeddings, or where there are none for positions one by one; look at each again.

        Args:
            starts: Gives beginnings of texts.
        """
        if self.budget.late:
            return
        if self.joint is None:
            self._one_by_one(starts())
        elif not self.entries and self.by_rows():
            return
        if self.account.is_more() or not self._told():  # where all is explained a climb finds what is there
            self._reviewed()
            while len(self.entries) > 1 and not self.budget.late and self.account.is_more() and self._lightened():
                pass
        self._settle()
        if self.joint is not None and all(self.certain) and not self.joint.told(self.entries):
            self.certain = []

    def _one_by_one(self, starts: Iterable[Ids]) -> None:
        """Find texts until what is left is noise."""
        strongest = 0.0
        pool = list(dict.fromkeys(start[:end] for start in starts for end in range(len(start), 0, -1)))
        while pool and not self.budget.late and not (self.entries and self.account.is_noise()):
            climb = self._climb()
            pool = self._promising(climb, pool)
            found = climb.run(climb.best(pool[:1]), thoroughly=False) if pool else None
            if found is None or found.value <= max(constants().outstanding, constants().weakest_text * strongest):
                break
            strongest = max(strongest, found.value)
            self._enter(found)
            self.budget.report("completion", len(self.entries))

    def _told(self) -> bool:
        """Whether every text is told from its neighbours as it is."""
        self.certain = [self._stands(entry) for entry in self.entries]
        return all(self.certain)

    def _stands(self, entry: Entry) -> bool:
        """Whether a text is told from its neighbours, all others taken off, and from itself with another label."""
        before, self.account.rest = self.account.rest, {name: each.clone() for name, each in self.account.rest.items()}
        self.account.take(entry._replace(weight=-entry.weight))
        climb = self._climb()
        text = climb.best([entry.tokens])
        self.account.rest = before
        return text.label == entry.label and self._apart(climb, text)

    def _reviewed(self) -> None:
        """Look at all texts until none changes."""
        while not self.budget.late and self._review():
            pass

    def _lightened(self) -> bool:
        """Leave out the lightest text, a near-copy of another may be, if the others explain as much without it."""
        before, entries, certain = {**self.account.rest}, list(self.entries), self.certain
        square = self.account.square()
        lightest = min(entries, key=lambda entry: entry.weight)
        self.account.rest = {name: each.clone() for name, each in before.items()}
        self.account.take(lightest._replace(weight=-lightest.weight))
        self.entries = [entry for entry in entries if entry is not lightest]
        self._reviewed()
        if self.account.square() < square:
            return True
        self.account.rest, self.entries, self.certain = before, entries, certain
        return False

    def _climb(self) -> Climb:
        return Climb(self.account.matched(), self.tokens, self.budget)

    def _promising(self, climb: Climb, pool: list[Ids]) -> list[Ids]:
        """The best starts, best first; those that were found are none."""
        known = {entry.tokens for entry in self.entries}
        rest = [text for text in pool if text not in known]
        if not rest:
            return []
        order = climb.matched.scores(rest).values.argsort(descending=True).tolist()
        return [rest[place] for place in order[: constants().starts]]

    def _enter(self, text: Text) -> None:
        entry = Entry(text.tokens, text.label, text.weight)
        self.account.take(entry)
        self.entries.append(entry)

    def _review(self) -> bool:
        """Look at every text again, all others taken off; whether any changed.

        What came from a beginning that is like two texts may climb to one that is there already: it is none.
        """
        before = [(entry.tokens, entry.label) for entry in self.entries]
        looked_at, self.entries, self.certain = self.entries, [], []
        for entry in looked_at:
            self.account.take(entry._replace(weight=-entry.weight))
            climb = self._climb()
            text = climb.run(climb.best([entry.tokens]))
            if self._joined(text):
                continue
            certain = self._apart(climb, text)  # before the text is taken off: the filter sees the same tensors
            self._enter(text)
            self.certain.append(certain)
        return before != [(entry.tokens, entry.label) for entry in self.entries]

    def _joined(self, text: Text) -> bool:
        """Whether a text is there already, to which it is added."""
        for place, entry in enumerate(self.entries):
            if (entry.tokens, entry.label) == (text.tokens, text.label):
                self.account.take(entry._replace(weight=text.weight))
                self.entries[place] = entry._replace(weight=entry.weight + text.weight)
                return True
        return False

    def _apart(self, climb: Climb, text: Text) -> bool:
        """Whether a text could not be missing unseen, and fits better than its neighbours by more than noise makes.

        Of a true text's S and a false one's, S less by D, the difference has the deviation of the noise times the
        length of the difference of their directions, which is `sqrt(2 D / S)`.
        """
        if self.budget.late:
            return False
        if self.account.hides(text.value**2):
            return False
        rivals = [*climb.neighbours(text), *climb.shorter(text)]
        rival = float(climb.matched.scores(rivals).values.max())
        behind = math.sqrt(max(text.value - rival, 0.0) * text.value / 2)
        return behind >= constants().apart

    def _settle(self) -> None:
        """Give every text the weight that it has in a batch of so many."""
        settled = [entry._replace(weight=1 / len(self.entries)) for entry in self.entries]
        if settled != self.entries:
            self.entries = settled
            self.account.left_by(settled)

    def outcome(self, before: Outcome) -> Outcome:
        """What was found, proven where nothing but noise is left; what was known before stays known.

        Args:
            before: What the usual search found.
        """
        number = len(self.entries)
        noise = bool(number) and self.account.is_noise()
        means = "matched filter" if self.joint is None else "rows of embeddings and the matched filter"
        told = f"{self.account.noise.told}: {number} found by the {means}"
        if noise and len(self.certain) == number and all(self.certain):
            return Outcome(Status.CERTIFIED, f"{told}; {self._proof}", self._texts({}, Certainty.WHOLE), size=number)
        if not number or before.status.claims_all:
            return before
        known = {text.tokens: text for text in before.texts if text.confirmation.certainty is Certainty.WHOLE}
        missing = "not each is told from its likeliest neighbours" if noise else "what they leave is more than noise"
        status = Status.OUT_OF_TIME if self.budget.late else Status.PARTIAL
        return Outcome(status, f"{told}, {missing}", self._texts(known, Certainty.GUESS))

    @property
    def _proof(self) -> str:
        """What proves the texts, in words."""
        if self.account.noise.is_exact:
            return f"simulated with labels they leave {self.account.share():.0e} of them unexplained"
        return "simulated they leave that noise, and each beats its likeliest neighbours (less than a proof)"

    def _texts(self, known: Mapping[Ids, FoundText], certainty: Certainty) -> tuple[FoundText, ...]:
        """The texts of the account with their labels, and those that were known before."""
        labels: dict[Ids, tuple[int, ...]] = {}
        for entry in self.entries:
            labels[entry.tokens] = (*labels.get(entry.tokens, ()), entry.label)
        found = {
            tokens: FoundText(tokens, 1.0, Confirmation(certainty), each, len(each)) for tokens, each in labels.items()
        }
        return tuple({**found, **known}.values())
