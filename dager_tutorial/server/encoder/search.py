"""Whole texts of a bidirectional model, one after the other, without enumerating any (chapter `08_encoder_recovery`).

Nothing is causal here: every row depends on the whole text, so that no prefix can be tested alone. But the attention
of block 0 is simple enough to be solved for its text. A seed, a token whose position block 0's gradient tells
(`unmixing`), stands fast; for every other position all candidates get weights (`relaxation`), and the weights under
which the seed's attention lies in the span of the attention-output gradient are, nearly always, the seed's text.
Where a few tokens are wrong, coordinate descent mends them (`polish`). A text counts only when all of its rows lie in
the spans of block 0 and deeper blocks (`confirmation`): a guess is never reported.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.confirmation import Confirmer, LastConfirmer
from dager_tutorial.server.encoder.polish import Polish
from dager_tutorial.server.encoder.relaxation import Beginning, Relaxation, Solution, grown
from dager_tutorial.server.encoder.seeds import Seed, by_company, companions, explained, known_tokens, overlapping
from dager_tutorial.server.encoder.tables import Clues, Text

Solve = Callable[[Seed], Text | None]
"""What finds the text of a seed."""


@dataclass(frozen=True)
class TextSearch:
    """Finds texts seed by seed until every direction of the span is explained.

    Attributes:
        clues: What block 0 says of the pairs.
        confirmer: Tests whole texts.
        relaxation: Solves for texts around known tokens; None for an ablation.
        polish: Mends what is nearly right; None for an ablation.
        expected: How many rows the batch has, where a rank tells.
        budget: What it may cost.
        hand_over: Whether to end as soon as texts were found and others do not follow easily.
    """

    clues: Clues
    confirmer: Confirmer | LastConfirmer
    relaxation: Relaxation | None
    polish: Polish | None
    expected: int | None
    budget: Budget
    hand_over: bool = False

    def run(self) -> dict[Text, float]:
        """Find all texts.

        Returns:
            The confirmed texts in the order of their discovery, as indices into the candidates, each with the largest
            residual ratio z of its rows.
        """
        found: dict[Text, float] = {}
        for seeds, solve in self._phases(found):
            self._try(found, seeds, solve)
            if self.hand_over and found:
                break
        return found

    def _phases(self, found: Mapping[Text, float]) -> Iterator[tuple[Iterable[Seed], Solve]]:
        """Seeds and how to solve for their texts, the quickest first; `found` grows meanwhile."""
        yield self._company(operator.le), self.quickly
        yield self._company(operator.eq), self.among_companions
        yield (Seed(*pair) for pair in self.clues.order), self.alone
        yield overlapping(tuple(found)), self.alone

    def _company(self, known_from: Callable[..., bool]) -> Iterable[Seed]:
        return by_company(self.clues, known_from) if self.relaxation is not None else ()

    def _try(self, found: dict[Text, float], seeds: Iterable[Seed], solve: Solve) -> None:
        """Add what these seeds lead to, until all is explained or many in a row lead to nothing new."""
        failures = 0
        for seed in seeds:
            if explained(seed, found):
                continue
            if self._over(found) or failures >= self._patience(found):
                break
            text = solve(seed)
            if text is None or text in found:
                failures += 1
                continue
            failures, found[text] = 0, float(self.confirmer.ratios(text).max())
            self.budget.report("search", sum(map(len, found)), self.expected)

    def _patience(self, found: Mapping[Text, float]) -> int:
        """How many seeds in a row may lead to nothing new."""
        return constants().stalled if self.hand_over and found else constants().failures

    def _over(self, texts: Iterable[Text]) -> bool:
        """Whether all rows are explained, or the time is spent."""
        return self.budget.late or (self.expected is not None and sum(map(len, texts)) >= self.expected)

    def quickly(self, seed: Seed) -> Text | None:
        """The text of a seed and its companions in one round of few equations.

        Args:
            seed: One that has companions.
        """
        known = companions(self.clues, seed) | known_tokens(self.clues, seed)
        solution = self._solved(self._narrow(known), constants().equations)
        return None if solution is None else self._confirmed(solution.text)

    def among_companions(self, seed: Seed) -> Text | None:
        """The text of a seed and its companions, of many equations and in several rounds.

        Args:
            seed: One that has companions.
        """
        known = companions(self.clues, seed) | known_tokens(self.clues, seed)
        return self._grown(self._narrow(known), constants().most_equations, constants().growth_rounds)

    def alone(self, seed: Seed) -> Text | None:
        """The text in which a seed stands, from nothing but the seed.

        Args:
            seed: Any pair that passes the filter.
        """
        known = known_tokens(self.clues, seed)
        if self.relaxation is None:
            return self._mended(self._likeliest(known))
        return first_of(self._around(self.relaxation, self._narrow(known).without(seed.forbidden)))

    def _around(self, relaxation: Relaxation, narrow: Beginning) -> Iterator[Text | None]:
        """What a seed leads to; last, as for a text of a few tokens, cut at each length."""
        equations, rounds = constants().equations, constants().growth_rounds
        solution = relaxation.solve(narrow, equations)
        if solution is not None:
            yield grown(relaxation, narrow, equations, rounds, self._mended, solution)
        wide = Beginning(narrow.known, narrow.later, narrow.later)
        yield self._grown(wide, equations, rounds)
        if solution is not None and self.polish is not None:
            for length in range(max(narrow.known) + 1, min(constants().short_text, len(solution.text)) + 1):
                yield self._mended(solution.text[:length])

    def _narrow(self, known: Mapping[int, int]) -> Beginning:
        """A beginning with what is likely elsewhere, and later with all that passes the filter."""
        return Beginning(known, self.clues.likely, self.clues.wide)

    def _grown(self, beginning: Beginning, equations: int, rounds: int) -> Text | None:
        assert self.relaxation is not None
        return grown(self.relaxation, beginning, equations, rounds, self._mended)

    def _solved(self, beginning: Beginning, equations: int) -> Solution | None:
        assert self.relaxation is not None
        return self.relaxation.solve(beginning, equations)

    def _likeliest(self, known: Mapping[int, int]) -> Text:
        """The token of the largest coefficient at each position, up to the last position that has one."""
        best = self.clues.coefficients.masked_fill(~self.clues.wide, -math.inf).argmax(1).tolist()
        return tuple(known.get(place, token) for place, token in enumerate(best))

    def _mended(self, text: Text) -> Text | None:
        """The text itself or what coordinate descent makes of it, if all of its rows are confirmed."""
        confirmed = self._confirmed(text)
        if confirmed is not None or self.polish is None or len(text) < 2:
            return confirmed
        return self._confirmed(self.polish.polished(text))

    def _confirmed(self, text: Text) -> Text | None:
        return text if self.confirmer.confirms(text) else None


def first_of(texts: Iterable[Text | None]) -> Text | None:
    """The first that is a text, if any.

    >>> first_of([None, (1, 2), (3,)])
    (1, 2)
    """
    return next((text for text in texts if text is not None), None)
