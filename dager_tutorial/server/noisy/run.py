"""The attack on an update with Gaussian noise: one text after the other, each explained away, then all of it judged.

Chapter `11_limits`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.guess import plausible_heads
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.run import ranked_prefixes
from dager_tutorial.server.embedding_rows import anywhere
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.noisy.account import Account, Entry
from dager_tutorial.server.noisy.climb import Climb, Text, shares
from dager_tutorial.server.noisy.deviation import deviation_of, outstanding, table_gradient
from dager_tutorial.server.noisy.matched import Matched
from dager_tutorial.server.outcome import FoundText, Outcome
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.update import Update


def through_noise(
    model: LanguageModel, update: Update, head: Head | None, evidence: Evidence, outcome: Outcome, budget: Budget
) -> Outcome:
    """Search an update that holds Gaussian noise, where the usual search has not explained it.

    Args:
        model: The model both sides know.
        update: What the client sent.
        head: The head that the server handed out; None where it is to be guessed.
        evidence: What the update says.
        outcome: What the usual search found.
        budget: What it may cost.

    Returns:
        The same outcome where there is no such noise, or nothing stands out from it.
    """
    head = head or plausible_heads(update, evidence.adapter)[0]
    if outcome.status is Status.CERTIFIED or head.task != "classification" or budget.late:
        return outcome
    deviation = deviation_of(evidence)
    words = table_gradient(evidence, evidence.adapter.first_input.tokens)
    if deviation is None or words is None:
        return outcome
    tokens = outstanding(words, deviation)
    if not len(tokens):
        return outcome
    with evidence.watch.stage("completion"):
        account = Account(Simulator(model, update, head, evidence.precision), update.gradients, deviation)
        search = _Search(account, tokens, budget)
        placed = _placed(evidence, tokens, deviation)
        if not (placed and search.is_all(placed)):
            length = len(placed) if placed else None
            search.run([placed, *(text.tokens for text in outcome.texts), *_ranked(evidence, tokens, length, budget)])
        search.settle()
    return search.outcome(outcome)


def _placed(evidence: Evidence, tokens: Tensor, deviation: float) -> Ids:
    """What stands at each position by the rows of both embeddings; nothing where positions have none."""
    table, words = evidence.adapter.position_table, table_gradient(evidence, evidence.adapter.first_input.tokens)
    gradient = None if table is None else table_gradient(evidence, table[0])
    if table is None or gradient is None or words is None:
        return ()
    rows = outstanding(gradient, deviation)
    slopes = gradient[table[1] : int(rows[-1]) + 1] if len(rows) else gradient[:0]
    return tuple(tokens[shares(words[tokens], slopes).argmax(1)].tolist()) if len(slopes) else ()


def _ranked(evidence: Evidence, tokens: Tensor, length: int | None, budget: Budget) -> list[Ids]:
    """What block 0 ranks best, of the tokens that there are."""
    rotary = evidence.adapter.position_table is None
    if not isinstance(evidence.adapter, DecoderAdapter) or not (rotary or length):
        return []
    return ranked_prefixes(evidence, evidence.adapter, anywhere(tokens, length), budget)


@dataclass
class _Search:
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

    def is_all(self, text: Ids) -> bool:
        """Whether a text, or what it climbs to, is all that there is; else it is forgotten."""
        climb = self._climb()
        found = climb.run(climb.best([text]), thoroughly=False)
        self._enter(found)
        self._review()
        if self.account.is_noise():
            return True
        self.account.take(self.entries.pop()._replace(weight=-self.entries[-1].weight))
        return False

    def run(self, starts: Iterable[Ids]) -> None:
        """Find texts until what is left is noise, then look at each again without the others."""
        pool = list(dict.fromkeys(start[:end] for start in starts for end in range(len(start), 0, -1)))
        while pool and not self.budget.late and not (self.entries and self.account.is_noise()):
            climb = self._climb()
            pool = self._promising(climb, pool)
            found = climb.run(climb.best(pool[:1]), thoroughly=False) if pool else None
            if found is None or found.value <= constants().outstanding * self.account.deviation:
                break
            self._enter(found)
            self.budget.report("completion", len(self.entries))
        while not self.budget.late and self._review():
            pass

    def _climb(self) -> Climb:
        return Climb(Matched(self.account.simulator, self.account.rest), self.tokens, self.budget)

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
        """Look at every text again, all others taken off; whether any changed."""
        before = [(entry.tokens, entry.label) for entry in self.entries]
        self.certain = []
        for place, entry in enumerate(list(self.entries)):
            self.account.take(entry._replace(weight=-entry.weight))
            climb = self._climb()
            text = climb.run(climb.best([entry.tokens]))
            self.entries[place] = Entry(text.tokens, text.label, text.weight)
            self.account.take(self.entries[place])
            self.certain.append(self._apart(climb, text))
        return before != [(entry.tokens, entry.label) for entry in self.entries]

    def _apart(self, climb: Climb, text: Text) -> bool:
        """Whether the likeliest neighbours of a text fit worse than noise can make the true text fit.

        Of a true text's S and a false one's, S less by D, the difference has the deviation of the noise times the
        length of the difference of their directions, which is `sqrt(2 D / S)`.
        """
        if self.budget.late:
            return False
        rival = float(climb.matched.scores(climb.neighbours(text)).values.max())
        behind = math.sqrt(max(text.value - rival, 0.0) * text.value / 2)
        return behind >= constants().apart * self.account.deviation

    def settle(self) -> None:
        """Give every text the weight that it has in a batch of so many."""
        for place, entry in enumerate(self.entries):
            exact = 1 / len(self.entries)
            self.account.take(entry._replace(weight=exact - entry.weight))
            self.entries[place] = entry._replace(weight=exact)

    def outcome(self, before: Outcome) -> Outcome:
        """What was found, with a certificate where nothing but noise is left; what was known before where nothing was."""
        if not self.entries:
            return before
        noise, number = self.account.is_noise(), len(self.entries)
        proven = noise and all(self.certain) and len(self.certain) == number
        by = Confirmation(Certainty.WHOLE if proven else Certainty.GUESS)
        texts = tuple(FoundText(entry.tokens, 1.0, by, (entry.label,), 1) for entry in self.entries)
        told = f"noise of deviation {self.account.deviation:.2g} on every entry; {number} texts found by the matched filter"
        if proven:
            said = f"{told}: simulated they leave that noise and nothing else"
            return Outcome(Status.CERTIFIED, said, texts, size=number)
        late = Status.OUT_OF_TIME if self.budget.late else Status.PARTIAL
        return Outcome(late, f"{told}: what they leave is more than noise" if not noise else f"{told}, not all told from others", texts)
