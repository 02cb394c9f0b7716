"""The attack on bidirectional models, stage by stage: spans, candidates, incidence, whole texts (chapter 5)."""

from __future__ import annotations

import time

from torch import Tensor

from dager_tutorial.server.encoder.search import PARTS, TextSearch
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.server.budget import Outcome, Run, expected_rows
from dager_tutorial.server.subspace import CLEAR_GAP, Span
from dager_tutorial.server.token_filter import Candidates, filter_tokens
from dager_tutorial.server.unmixing import Incidence, candidate_tokens, incidence, same_text, unmix


class EncoderRun(Run):
    """One run on a bidirectional model."""

    @property
    def adapter(self) -> EncoderAdapter:
        """The architecture."""
        assert isinstance(self.evidence.adapter, EncoderAdapter)
        return self.evidence.adapter

    def search(self) -> Outcome:
        """Find the tokens, where they stood, and text after text by the attention of block 0."""
        first = self.evidence.span(0, QKV)
        if first is None or first.rank == 0:
            return _nothing("no_signal", "block 0's query, key and value gradients are missing or zero")
        if self.adapter.num_blocks < 2:
            return _nothing(
                "partial", "one block holds the rows that the loss reads, not whole texts: load more blocks"
            )
        if first.saturated:
            return _nothing("saturated", "block 0 is full: even single tokens hide in the rank")
        start = time.perf_counter()
        candidates = filter_tokens(
            self.adapter.first_input, first, seed=self.config.seed, progress=self.report("filter")
        )
        self.seconds["filter"] = time.perf_counter() - start
        if not candidates.count:
            reason = "no token of the vocabulary lies in the span of block 0: another model, or too much noise"
            return _nothing("no_candidates", reason)
        span = self.evidence.span(0, ATTENTION_OUTPUT)
        if span is None:
            return _nothing("partial", "block 0's attention output gradient was not shared: tokens, but no texts")
        if blurred(span):
            reason = "about as many rows as the model is wide: tokens can be told, whole texts cannot"
            return _nothing("saturated", reason)
        return self._texts(candidates, span)

    def _texts(self, candidates: Candidates, span: Span) -> Outcome:
        start, before = time.perf_counter(), self.evidence.seconds
        confirming = self._confirming()
        if not confirming:
            return _nothing("partial", "no tap beyond block 0's attention output is left to confirm a text by")
        expected = expected_rows([span, *confirming.values()])
        search = TextSearch(
            self.adapter,
            candidates,
            *self._incidence(candidates),
            span,
            confirming,
            expected_rows=expected,
            memory=self.config.memory_mb * 2**20,
            deadline=self.deadline(),
            seed=self.config.seed,
            progress=self.report("search"),
            parts=PARTS - self.config.without,
        )
        texts = search.run()
        self.seconds["search"] = time.perf_counter() - start - (self.evidence.seconds - before)
        return Outcome(
            tuple(text.tokens for text in texts),
            tuple(text.ratio for text in texts),
            *verdict(search.rows, expected, late=self.late()),
        )

    def _incidence(self, candidates: Candidates) -> tuple[Incidence | None, Tensor | None]:
        """Which token stood where, and which stood together, as far as block 0's gradient determines it."""
        gradient = self.adapter.tap(0, QKV).gradient(self.evidence.gradients)
        if gradient is None or len(gradient) != 3 * self.adapter.hidden_size:
            return None, None
        marginals = unmix(self.adapter.first_input, gradient, candidate_tokens(candidates), len(candidates.tokens))
        if marginals is None:
            return None, None
        heads = 3 * self.adapter.num_heads
        where = incidence(marginals, heads)
        return where, same_text(marginals, heads, where)

    def _confirming(self) -> dict[Tap, Span]:
        """Spans of deeper taps that hold every row of the batch: each must lie in all of them.

        Whatever the loss reads, it reaches all rows of a block through the attention of the next one. The last block
        has no next one.
        """
        deeper = self._spans([(block, QKV) for block in (1, 2) if block < self.adapter.num_blocks - 1])
        return deeper or self._spans([(0, MLP)])

    def _spans(self, places: list[tuple[int, str]]) -> dict[Tap, Span]:
        spans = {self.adapter.tap(*place): self.evidence.span(*place) for place in places}
        return {tap: span for tap, span in spans.items() if span is not None and not blurred(span)}


def blurred(span: Span) -> bool:
    """Whether a span may be full, so that texts which are nearly right would pass.

    Without a clear gap a cut in the upper half of the width may run through the signal: what it leaves outside is then
    taken for noise, and much is forgiven.
    """
    return span.saturated or (span.gap < CLEAR_GAP and 2 * span.rank >= span.width)


def verdict(rows: int, expected: int | None, *, late: bool = False) -> tuple[str, str]:
    """Status and diagnosis, from the rows that confirmed texts explain and those that a rank with a clear gap tells."""
    if expected is None:
        return ("partial" if rows else "no_candidates"), f"{rows} rows confirmed; noise hides how many there are"
    if rows == expected:
        return "exact", f"all {expected} rows of the batch are explained"
    stopped = "the time budget was spent" if late else "no seed leads to the others"
    return ("partial" if rows else "no_candidates"), f"{rows} of {expected} rows confirmed: {stopped}"


def _nothing(status: str, diagnosis: str) -> Outcome:
    return Outcome((), (), status, diagnosis)
