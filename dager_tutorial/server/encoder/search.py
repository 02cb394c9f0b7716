"""Whole texts of a bidirectional model, one after the other, without enumerating any (chapter 5).

Nothing is causal here: every row depends on the whole text, so that no prefix can be tested alone. But the attention
of block 0 is simple enough to be solved for its text. A seed, a token whose position block 0's gradient tells
(`unmixing`), stands fast; for every other position all candidates get weights (`simplex`), and the weights under
which the seed's attention lies in the span of the attention-output gradient are, nearly always, the seed's text.
Where a few tokens are wrong, coordinate descent mends them. A text counts only when all of its rows lie in the spans
of block 0 and deeper blocks: a guess is never reported.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.tap import Tap
from dager_tutorial.server.encoder.interior_point import relax
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates, first_vectors
from dager_tutorial.server.unmixing import Incidence, candidate_tokens

# Equations of one relaxation. Several hundred decide between thousands of candidates where enough tokens are known;
# what they leave open is tried once more with as many as memory allows, up to the second number; below
# FEWEST nothing is tried.
EQUATIONS = (480, 1440)
FEWEST = 240
QUERIES = 16
# A weight above this settles a position for the next round.
SETTLED = 0.9
ROUNDS = 3
# Directions in which the polish measures what lies outside the span.
POLISH_DIRECTIONS = 48
SWEEPS = 3
# Texts of so few tokens are lost among the weights of longer ones: every length is tried.
SHORT = 8
# Seeds in a row that lead to no text before the search gives up.
FAILURES = 40

Pair = tuple[int, int]  # position and token
Solution = tuple[tuple[int, ...], list[float]]  # a text, and the weight of each of its tokens

PARTS = frozenset({"incidence", "relaxation", "polish"})


@dataclass(frozen=True)
class Text:
    """A confirmed text.

    Attributes:
        tokens: Token ids.
        ratio: The largest residual ratio z of its rows, about 1 to 2 for a true text.
    """

    tokens: tuple[int, ...]
    ratio: float


class TextSearch:
    """Finds texts seed by seed until every direction of the span is explained.

    Args:
        adapter: The architecture.
        candidates: Tokens that may stand at each position.
        incidence: Which token stood where, coefficients over positions x the sorted distinct candidates; None where
            block 0 does not tell.
        together: Which of these tokens surely stand in one text (bool, tokens x tokens), or None.
        span: Span of block 0's attention output map.
        confirming: Spans that hold every row of the batch, by their taps; each row of a text must lie in all of them.
        expected_rows: How many rows the batch has, where a rank tells.
        memory: Bytes that one relaxation's tables may take: where it is short there are fewer equations, or none.
        deadline: `time.perf_counter()` at which to stop; None for never.
        seed: Seed of the random mixtures of equations.
        progress: Called with rows explained and rows expected, or None.
        parts: What the search may use; all of `PARTS`, or fewer for ablations.
    """

    def __init__(
        self,
        adapter: EncoderAdapter,
        candidates: Candidates,
        incidence: Incidence | None,
        together: Tensor | None,
        span: Span,
        confirming: Mapping[Tap, Span],
        *,
        expected_rows: int | None = None,
        memory: int = 2**29,
        deadline: float | None = None,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
        parts: frozenset[str] = PARTS,
    ) -> None:
        self.adapter, self.span, self.confirming = adapter, span, confirming
        self.expected_rows, self.deadline, self.progress, self.parts = expected_rows, deadline, progress, parts
        self.memory = memory
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = candidate_tokens(candidates)
        self.together = None if together is None or "incidence" not in parts else together
        self.wide = _passing(candidates, self.tokens)
        self.coefficients, self.likely, self.order = self._evidence(incidence)
        self.query, self.key, self.value = self._projections()
        self.outside = span.directions[:, span.rank :]
        self.sketch = self._mixture(POLISH_DIRECTIONS).float()
        self.found: list[Text] = []
        self.texts: list[tuple[int, ...]] = []
        self.forbidden: Pair | None = None

    def run(self) -> list[Text]:
        """All texts that were found, in the order of their discovery."""
        self._try(self._unexplained(self._gregarious(operator.le)), self._quickly)
        self._try(self._unexplained(self._gregarious(operator.eq)), self._among_companions)
        self._try(self._unexplained(self.order), self._text_of)
        self._try(self._overlapping(), self._text_of)
        return self.found

    def _try(self, seeds: Iterable[Pair], solve: Callable[[Pair], tuple[int, ...] | None]) -> None:
        """Look for the text of each seed, until all rows are explained or too many seeds in a row lead to nothing."""
        failures = 0
        for seed in seeds:
            if self._done() or failures >= FAILURES:
                break
            text = solve(seed)
            failures = 0 if text is not None and self._keep(text) else failures + 1

    def _gregarious(self, known_from: Callable[[set[Pair], set[Pair]], bool]) -> Iterator[Pair]:
        """Pairs (position, token) with companions, the most companions first: the more is known, the less is open.

        A pair whose company is known from another's, as the same or as a part of it, is left out.
        """
        if self.together is None or "relaxation" not in self.parts:
            return
        count, places = self.together.sum(1), self.coefficients.argmax(0).tolist()
        seen: list[set[Pair]] = []
        for token in count.argsort(descending=True, stable=True)[: int((count > 0).sum())].tolist():
            pair = (places[token], token)
            company = {pair, *self._companions(pair).items()}
            if not any(known_from(company, other) for other in seen):
                seen.append(company)
                yield pair

    def _unexplained(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Those pairs (position, token) that are in no text found so far."""
        for pair in pairs:
            if not any(pair[0] < len(text) and text[pair[0]] == pair[1] for text in self.texts):
                yield pair

    def _overlapping(self) -> Iterator[Pair]:
        """Pairs of found texts, each while one other pair of that text is forbidden: it may belong to two texts.

        A text all of whose pairs stand in others too, as one that begins another and ends like a third, is found so.
        """
        for text in list(self.texts):
            for absent in range(len(text) - 1, 0, -1):
                for position in (1, len(text) // 2, len(text) - 1):
                    if position != absent:
                        self.forbidden = (absent, text[absent])
                        yield position, text[position]
        self.forbidden = None

    @property
    def rows(self) -> int:
        """How many rows the found texts explain."""
        return sum(len(text.tokens) for text in self.found)

    def _done(self) -> bool:
        late = self.deadline is not None and time.perf_counter() > self.deadline
        return late or (self.expected_rows is not None and self.rows >= self.expected_rows)

    def _keep(self, text: tuple[int, ...]) -> bool:
        """Take a confirmed text in, unless it is known."""
        if text in self.texts:
            return False
        self.texts.append(text)
        ids = tuple(int(self.tokens[token]) for token in text)
        self.found.append(Text(ids, float(self._ratios(text).max())))
        if self.progress:
            self.progress(self.rows, self.expected_rows)
        return True

    # Evidence and tables

    def _evidence(self, incidence: Incidence | None) -> tuple[Tensor, Tensor, list[Pair]]:
        """Coefficients and likely pairs (both positions x tokens), and the pairs in the order in which to try them."""
        if incidence is None or "incidence" not in self.parts:
            flat = torch.zeros(self.wide.shape, dtype=torch.float64, device=self.tokens.device)
            return flat, self.wide, [(int(i), int(t)) for i, t in self.wide.nonzero() if i > 0]
        odds = torch.where(self.wide, incidence.log_odds, -math.inf)
        odds[0] = -math.inf
        ranked = odds.flatten().argsort(descending=True)[: int((odds > -math.inf).sum())]
        return (
            incidence.coefficients,
            self.wide & incidence.likely,
            [divmod(int(pair), len(self.tokens)) for pair in ranked],
        )

    def _projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (float32, positions x tokens x heads x width) of every pair in block 0."""
        parts = []
        for position in range(len(self.wide)):
            vectors = first_vectors(self.adapter.first_input, self.tokens, torch.full_like(self.tokens, position))
            parts.append(self.adapter.project(0, vectors))
        query, key, value = (torch.stack(part) for part in zip(*parts, strict=True))
        return query, key, value

    def _mixture(self, count: int) -> Tensor:
        """Random orthonormal directions (float64, width x at most `count`) outside the span."""
        free = self.outside.shape[1]
        if count >= free:
            return self.outside
        mix = torch.randn(len(self.outside), count, generator=self.generator, dtype=torch.float64)
        # Drawn outside any basis: rounding turns the basis, and the mixtures must be the same on every machine.
        return torch.linalg.qr(self.outside @ (self.outside.T @ mix.to(self.outside.device))).Q

    # One text

    def _quickly(self, seed: Pair) -> tuple[int, ...] | None:
        """The text of a seed in one round of few equations: with its companions or, as one may be wrong, without."""
        known = self._known(seed)
        beginnings = (self._companions(seed) | known, known)
        return self._first(self._grown(beginning, self.likely, EQUATIONS[0], 1) for beginning in beginnings)

    def _among_companions(self, seed: Pair) -> tuple[int, ...] | None:
        """The text of a seed and its companions, of many equations and in several rounds."""
        return self._grown(self._companions(seed) | self._known(seed), self.likely, EQUATIONS[1], ROUNDS)

    def _text_of(self, seed: Pair) -> tuple[int, ...] | None:
        """The text in which a token stands at a position, as indices into `tokens`; None where none is confirmed."""
        known = self._known(seed)
        if "relaxation" not in self.parts:
            return self._mended(self._likeliest(known))
        return self._first(self._alone(known))

    def _alone(self, known: Mapping[int, int]) -> Iterator[tuple[int, ...] | None]:
        """What a seed without companions leads to; last, as for a text of a few tokens, cut at each length."""
        narrow = self._relaxed(known, self.likely, EQUATIONS[0])
        yield self._grown(known, self.likely, EQUATIONS[0], ROUNDS, narrow)
        yield self._grown(known, self.wide, EQUATIONS[0], ROUNDS)
        if narrow is not None and "polish" in self.parts:
            for length in range(max(known) + 1, min(SHORT, len(narrow[0])) + 1):
                yield self._mended(narrow[0][:length])

    @staticmethod
    def _first(texts: Iterable[tuple[int, ...] | None]) -> tuple[int, ...] | None:
        return next((text for text in texts if text is not None), None)

    def _known(self, seed: Pair) -> dict[int, int]:
        """Position to token: the seed, and the token that begins every text where there is just one."""
        first = self.wide[0].nonzero()[:, 0].tolist()
        return dict([seed]) | ({0: first[0]} if len(first) == 1 else {})

    def _companions(self, seed: Pair) -> dict[int, int]:
        """Tokens that surely stand in the text of a seed, each where it surely stands.

        One that is the mate of few others is left out: the others are mates of each other, and it may be a mistake. So
        are two that would stand at one position.
        """
        if self.together is None:
            return {}
        mates = self.together[seed[1]].nonzero()[:, 0]
        if len(mates):
            links = self.together[mates][:, mates].sum(1).double()
            mates = mates[links >= links.median() / 2]
        places = self.coefficients[:, mates].argmax(0)
        alone = torch.bincount(places, minlength=1)[places] == 1
        return dict(zip(places[alone].tolist(), mates[alone].tolist(), strict=True))

    def _grown(
        self,
        known: Mapping[int, int],
        allowed: Tensor,
        equations: int,
        rounds: int,
        solution: Solution | None = None,
    ) -> tuple[int, ...] | None:
        """Solve for the text around known tokens; what is settled becomes known, until nothing new is.

        `solution` is the first round's, where it is there already.
        """
        for _ in range(rounds):
            solution = solution or self._relaxed(known, allowed, equations)
            if solution is None:
                return None
            text, weights = solution
            if sum(weight > 0.5 for weight in weights) < len(weights) / 2:
                return None
            mended = self._mended(text)
            if mended is not None:
                return mended
            settled = {place: item for place, item in enumerate(text) if weights[place] > SETTLED} | dict(known)
            if len(settled) == len(known):
                return None
            known, allowed, solution = settled, self.wide, None
        return None

    def _relaxed(self, known: Mapping[int, int], allowed: Tensor, equations: int) -> Solution | None:
        """Solve for the text around known tokens: the heaviest candidate of each position and its weight."""
        allowed = allowed.clone()
        if self.forbidden is not None:
            allowed[self.forbidden] = False
        for place, token in known.items():
            allowed[place] = False
            allowed[place, token] = True
        places, tokens = allowed.nonzero().T
        equations = min(equations, self._affordable(len(places)))
        if equations < FEWEST:
            return None
        asked = sorted(known)[:: math.ceil(len(known) / QUERIES)]
        directions = self._mixture(equations)
        queries = self.query[asked, [known[place] for place in asked]]
        scores = torch.einsum("qhw,chw->qhc", queries, self.key[places, tokens]).double() * self.adapter.scaling(0)
        attention = (scores - scores.amax(2, keepdim=True)).exp()
        heads = directions.unflatten(0, queries.shape[1:])
        outside = torch.einsum("chw,hwd->hcd", self.value[places, tokens].double(), heads)
        optional = torch.arange(len(allowed), device=places.device) > max(known)
        weights = relax(attention, outside, places, optional, math.ceil(equations / len(asked))).weights
        return _heaviest(places, tokens, weights, len(allowed))

    def _affordable(self, candidates: int) -> int:
        """How many equations fit into memory: tables of heads x directions and four of equations, each x candidates."""
        numbers, heads = self.memory // (8 * candidates), self.adapter.num_heads
        return max(numbers // (heads + 4), (numbers - heads * self.outside.shape[1]) // 4)

    def _likeliest(self, known: Mapping[int, int]) -> tuple[int, ...]:
        """The token of the largest coefficient at each position, up to the last position that has one."""
        best = self.coefficients.masked_fill(~self.wide, -math.inf).argmax(1).tolist()
        return tuple(known.get(place, token) for place, token in enumerate(best))

    def _mended(self, text: tuple[int, ...]) -> tuple[int, ...] | None:
        """The text itself or what coordinate descent makes of it, if all of its rows are confirmed."""
        if self._confirmed(text):
            return text
        if "polish" not in self.parts or len(text) < 2:
            return None
        text = self._polished(text)
        return text if self._confirmed(text) else None

    def _polished(self, text: tuple[int, ...]) -> tuple[int, ...]:
        """Replace one token after the other by the one that leaves the least outside the span."""
        best = math.inf
        for _ in range(SWEEPS):
            before = best
            for place in range(len(text)):
                choices = self.wide[place].nonzero()[:, 0]
                energies = self._energies(text, place, choices)
                lowest = int(energies.argmin())
                best = float(energies[lowest])
                text = (*text[:place], int(choices[lowest]), *text[place + 1 :])
            if best > 0.999 * before:
                break
        return text

    def _energies(self, text: tuple[int, ...], place: int, choices: Tensor) -> Tensor:
        """What all rows leave outside the span (float32, choices) for each choice of the token at a place."""
        places = torch.arange(len(text), device=choices.device)
        tokens = torch.tensor(text, device=choices.device)
        rest = places != place
        query, key = self.query[places, tokens][rest], self.key[places, tokens][rest]
        projected = torch.einsum("thw,hwd->thd", self.value[places, tokens][rest], self._heads)
        new_query, new_key = self.query[place, choices], self.key[place, choices]
        new_value = torch.einsum("thw,hwd->thd", self.value[place, choices], self._heads)
        scale = self.adapter.scaling(0)
        shared = (torch.einsum("qhw,thw->qht", query, key) * scale).exp()
        added = (torch.einsum("qhw,chw->qch", query, new_key) * scale).exp()
        above = torch.einsum("qht,thd->qhd", shared, projected)[:, None] + added[..., None] * new_value
        rows = (above / (shared.sum(2)[:, None] + added)[..., None]).sum(2)
        own = (torch.einsum("chw,thw->cht", new_query, key) * scale).exp()
        self_added = ((new_query * new_key).sum(2) * scale).exp()
        above = torch.einsum("cht,thd->chd", own, projected) + self_added[..., None] * new_value
        own_row = (above / (own.sum(2) + self_added)[..., None]).sum(1)
        return rows.square().sum((0, 2)) + own_row.square().sum(1)

    @property
    def _heads(self) -> Tensor:
        """The polish's directions, heads x head width x directions."""
        return self.sketch.unflatten(0, self.query.shape[2:])

    # Confirmation

    def _ratios(self, text: tuple[int, ...]) -> Tensor:
        """Residual ratio z of every row of a text at block 0's attention output."""
        places, tokens = list(range(len(text))), list(text)
        query, key, value = (table[places, tokens] for table in (self.query, self.key, self.value))
        shares = (torch.einsum("qhw,thw->hqt", query, key) * self.adapter.scaling(0)).softmax(-1)
        return self.span.ratio(torch.einsum("hqt,thw->qhw", shares, value).flatten(1))

    def _confirmed(self, text: tuple[int, ...]) -> bool:
        """Whether every row lies in the span of block 0's attention output and of the deeper taps."""
        if not text or not bool((self._ratios(text) <= self.span.bound).all()):
            return False
        ids = self.tokens[list(text)][None]
        inputs = self.adapter.tap_inputs(ids, torch.ones_like(ids), self.confirming)
        return all(bool((span.ratio(inputs[tap][0]) <= span.bound).all()) for tap, span in self.confirming.items())


def _passing(candidates: Candidates, tokens: Tensor) -> Tensor:
    """Which token passes at which position (bool, positions x tokens)."""
    return torch.stack([torch.isin(tokens, passed) for passed in candidates.tokens])


def _heaviest(places: Tensor, tokens: Tensor, weights: Tensor, count: int) -> Solution:
    """Each position's heaviest token and its weight, up to the first position that is rather empty."""
    text, heaviest = [], []
    for place in range(count):
        here = places == place
        if float(weights[here].sum()) <= 0.5:
            break
        best = int(weights[here].argmax())
        text.append(int(tokens[here][best]))
        heaviest.append(float(weights[here][best]))
    return tuple(text), heaviest
