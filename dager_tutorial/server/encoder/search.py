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
from dager_tutorial.server.encoder.confirmation import Confirmer
from dager_tutorial.server.encoder.polish import Polish
from dager_tutorial.server.encoder.relaxation import Beginning, Relaxation, grown
from dager_tutorial.server.encoder.seeds import Seed, by_company, companions, explained, known_tokens, overlapping
from dager_tutorial.server.encoder.tables import Clues, Text


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
    """

    clues: Clues
    confirmer: Confirmer
    relaxation: Relaxation | None
    polish: Polish | None
    expected: int | None
    budget: Budget

    def run(self) -> dict[Text, float]:
        """Find all texts.

        Returns:
            The confirmed texts in the order of their discovery, as indices into the candidates, each with the largest
            residual ratio z of its rows.
        """
        found: dict[Text, float] = {}
        found = self._tried(found, self._company(operator.le), self.quickly)
        found = self._tried(found, self._company(operator.eq), self.among_companions)
        found = self._tried(found, (Seed(*pair) for pair in self.clues.order), self.alone)
        return self._tried(found, overlapping(found), self.alone)

    def _company(self, known_from: Callable[..., bool]) -> Iterable[Seed]:
        return by_company(self.clues, known_from) if self.relaxation is not None else ()

    def _tried(
        self, found: Mapping[Text, float], seeds: Iterable[Seed], solve: Callable[[Seed], Text | None]
    ) -> dict[Text, float]:
        """What was found and what these seeds lead to, until all is explained or many in a row lead to nothing new."""
        texts, failures = dict(found), 0
        for seed in seeds:
            if explained(seed, texts):
                continue
            if self._over(texts) or failures >= constants().failures:
                break
            text = solve(seed)
            if text is None or text in texts:
                failures += 1
                continue
            failures, texts[text] = 0, float(self.confirmer.ratios(text).max())
            self.budget.report("search", sum(map(len, texts)), self.expected)
        return texts

    def _over(self, texts: Iterable[Text]) -> bool:
        """Whether all rows are explained, or the time is spent."""
        return self.budget.late or (self.expected is not None and sum(map(len, texts)) >= self.expected)

    def quickly(self, seed: Seed) -> Text | None:
        """The text of a seed in one round of few equations: with its companions or, as one may be wrong, without.

        Args:
            seed: One that has companions.
        """
        known = known_tokens(self.clues, seed)
        beginnings = (companions(self.clues, seed) | known, known)
        return _first(self._grown(self._narrow(each), constants().equations, 1) for each in beginnings)

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
        return _first(self._around(self.relaxation, self._narrow(known).without(seed.forbidden)))

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

    def _likeliest(self, known: Mapping[int, int]) -> Text:
        """The token of the largest coefficient at each position, up to the last position that has one."""
        best = self.clues.coefficients.masked_fill(~self.clues.wide, -math.inf).argmax(1).tolist()
        return tuple(known.get(place, token) for place, token in enumerate(best))

    def _mended(self, text: Text) -> Text | None:
        """The text itself or what coordinate descent makes of it, if all of its rows are confirmed."""
        if self.confirmer.confirms(text):
            return text
        if self.polish is None or len(text) < 2:
            return None
        text = self.polish.polished(text)
        return text if self.confirmer.confirms(text) else None


def _first(texts: Iterable[Text | None]) -> Text | None:
    return next((text for text in texts if text is not None), None)
