"""The attack on causal models, stage by stage: spans, candidates, prefixes, whole texts (chapters 2 to 4)."""

from __future__ import annotations

import time

from dager_tutorial.server.decoder.tree import PrefixSearch, Tree
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, QUERY, Tap
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.server.budget import Outcome, Run, expected_rows
from dager_tutorial.server.decoder.leverage import LeverageSearch, filter_by_leverage
from dager_tutorial.server.decoder.ends import Texts, whole_texts
from dager_tutorial.server.subspace import CLEAR_GAP, Span
from dager_tutorial.server.token_filter import Candidates, filter_tokens

# How many prefixes of one length a search by leverage keeps at most.
WIDEST = 128


class DecoderRun(Run):
    """One run on a causal model."""

    @property
    def adapter(self) -> DecoderAdapter:
        """The architecture."""
        assert isinstance(self.evidence.adapter, DecoderAdapter)
        return self.evidence.adapter

    def search(self) -> Outcome:
        """Grow prefixes from the first token on, by residuals where there are any, else by leverage."""
        tree, texts, status, diagnosis = self._searched()
        sequences = tuple(tree.nodes[index].tokens for index in texts.nodes)
        return Outcome(sequences, tuple(tree.nodes[index].ratio for index in texts.nodes), status, diagnosis)

    def _searched(self) -> tuple[Tree, Texts, str, str]:
        first = self.evidence.span(0, QKV)
        if first is None or first.rank == 0:
            reason = "block 0's query, key and value gradients are missing or zero: nothing to test tokens against"
            return Tree(), Texts((), ()), "no_signal", reason
        spans = self._cascade_spans()
        saturated = first.saturated or any(span.saturated for span in spans.values())
        candidates = self._candidates(first)
        if not candidates.count:
            reason = "no token of the vocabulary lies in the span of block 0: another model, or too much noise"
            return Tree(), Texts((), ()), "saturated" if saturated else "no_candidates", reason
        last = self._last_spans()
        expected = expected_rows(spans.values())
        start, before = time.perf_counter(), self.evidence.seconds
        if not saturated:
            search = self._prefix_search(candidates, spans, expected)
            tree = search.run()
            # Without a clear gap noise may cut a full rank short: it shows in more prefixes passing than there can be.
            saturated = search.overflowed and all(2 * span.rank >= span.width for span in spans.values())
        if saturated:
            tree = self._leverage_search(candidates, last).run()
        texts = whole_texts(self.adapter, tree, last)
        self.seconds["search"] = time.perf_counter() - start - (self.evidence.seconds - before)
        if saturated:
            return tree, *saturated_verdict(tree, texts, last)
        return tree, texts, *verdict(tree, texts, expected)

    def _candidates(self, first: Span) -> Candidates:
        start = time.perf_counter()
        source, report = self.adapter.first_input, self.report("filter")
        if first.saturated:
            candidates = filter_by_leverage(source, first, late=self.late)
        else:
            candidates = filter_tokens(source, first, seed=self.config.seed, progress=report)
        self.seconds["filter"] = time.perf_counter() - start
        return candidates

    def _prefix_search(
        self, candidates: Candidates, spans: dict[tuple[int, str], Span], expected: int | None
    ) -> PrefixSearch:
        return PrefixSearch(
            self.adapter,
            spans,
            candidates,
            expected_rows=expected,
            memory=self.config.memory_mb * 2**20,
            deadline=self.deadline(),
            seed=self.config.seed,
            progress=self.report("search"),
        )

    def _leverage_search(self, candidates: Candidates, last: dict[Tap, Span]) -> LeverageSearch:
        spans = {place: self.evidence.span(*place) for place in [(0, MLP)] + [(1, QKV)] * (self.adapter.num_blocks > 1)}
        # Of a loss at each text's last token, the last block's rank is the number of texts.
        texts = max((span.rank for span in last.values()), default=WIDEST)
        return LeverageSearch(
            self.adapter,
            {place: span for place, span in spans.items() if span is not None},
            candidates,
            widest=min(2 * texts, WIDEST),
            memory=self.config.memory_mb * 2**20,
            deadline=self.deadline(),
            seed=self.config.seed,
            progress=self.report("search"),
        )

    def _cascade_spans(self) -> dict[tuple[int, str], Span]:
        """Spans of the taps that the search tests; the MLP's only where one of the others cannot decide alone."""
        wanted = [(0, ATTENTION_OUTPUT)] + [(1, QKV)] * (self.adapter.num_blocks > 1)
        spans = {place: span for place in wanted if (span := self.evidence.span(*place)) is not None}
        if len(spans) < 2 or any(span.gap < CLEAR_GAP for span in spans.values()):
            span = self.evidence.span(0, MLP)
            if span is not None:
                spans[0, MLP] = span
        return spans

    def _last_spans(self) -> dict[Tap, Span]:
        """Spans that tell where texts end: of the last block, as far as it was shared and is not full.

        The attention's output map decides alone where it can tell; in low precision neighbours are too alike in it.
        """
        spans: dict[Tap, Span] = {}
        for kind in (ATTENTION_OUTPUT, QUERY):
            tap = self.adapter.tap(self.adapter.num_blocks - 1, kind)
            span = self.evidence.span(tap.block, kind)
            if span is not None and not span.saturated:
                spans[tap] = span
                if span.between >= CLEAR_GAP * span.bound:
                    break
        return spans


def verdict(tree: Tree, texts: Texts, expected: int | None) -> tuple[str, str]:
    """Status and diagnosis of an unsaturated search."""
    rows = tree.distinct_rows()
    if not texts.nodes:
        return (
            "no_candidates",
            "tokens pass the filter, but none begins a text: another model, or too much noise",
        )
    if expected is None:
        return "partial", f"{rows} prefixes confirmed; noise hides how many there are"
    if rows < expected:
        return "partial", f"{rows} of {expected} distinct prefixes confirmed"
    if rows > expected:
        return "partial", f"{rows} prefixes pass where {expected} are independent: some are too alike to be told apart"
    if not all(texts.confirmed):
        return "partial", "a text ends where the last block sees no end"
    return "exact", f"all {expected} distinct prefixes are explained"


def saturated_verdict(tree: Tree, texts: Texts, last: dict[Tap, Span]) -> tuple[Texts, str, str]:
    """Texts, status and diagnosis of a search by leverage: what the last block confirms, then the likeliest others."""
    confirmed = [index for index, sure in zip(texts.nodes, texts.confirmed, strict=True) if sure and last]
    rest = sorted(set(texts.nodes) - set(confirmed), key=lambda index: tree.nodes[index].ratio)
    room = max((span.rank for span in last.values()), default=WIDEST) - len(confirmed)
    kept = (*confirmed, *rest[: max(0, room)])
    said = f"{len(confirmed)} texts confirmed by the last block" if last else "no block left to confirm a text"
    diagnosis = f"about as many prefixes as the model is wide, told by leverage alone: {said}"
    return Texts(kept, tuple(index in set(confirmed) for index in kept)), "saturated", diagnosis
