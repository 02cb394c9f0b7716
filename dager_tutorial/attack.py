"""The whole attack: an update and a model in, a reconstruction and a diagnosis out (chapter 6).

Nothing here has a threshold to set. Each stage is a file of its own: `subspace` reads spans off the gradients,
`token_filter` finds candidates, `decoder` grows prefixes, `sentences` tells where texts end.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .decoder import PrefixSearch, Tree
from .errors import DagerError
from .evidence import Evidence, evidence_of
from .models import LanguageModel
from .models.base import ATTENTION_OUTPUT, MLP, QKV, QUERY, DecoderAdapter, Tap
from .reconstruction import Reconstruction
from .saturated import LeverageSearch, filter_by_leverage
from .sentences import Texts, whole_texts
from .subspace import CLEAR_GAP, Span
from .token_filter import Candidates, filter_tokens
from .update import Update

# How many prefixes of one length a search by leverage keeps at most.
WIDEST = 128

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class AttackConfig:
    """What a run may cost. There is nothing to tune.

    Attributes:
        seed: Seed of the random projections that screen candidates.
        time_budget: Seconds after which the search returns what it has; None for no limit.
        memory_mb: Megabytes that intermediate results may take, besides model and update.
    """

    seed: int = 0
    time_budget: float | None = None
    memory_mb: int = 512

    def __post_init__(self) -> None:
        """Refuse budgets that no run can keep."""
        if self.time_budget is not None and not self.time_budget > 0:
            raise DagerError(f"time_budget is {self.time_budget}: give a positive number of seconds, or None")
        if self.memory_mb < 16:
            raise DagerError(f"memory_mb is {self.memory_mb}: give at least 16")


def attack(
    model: LanguageModel,
    update: Update,
    *,
    config: AttackConfig | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Recover the texts of a client's batch from its update.

    Args:
        model: The model both sides know.
        update: What the client sent, and all that is known of the batch.
        config: What the run may cost.
        progress: Called with the stage, what is done and the total or None.

    Returns:
        The recovered token sequences with a status; an uninformative update gives an empty one, never an exception.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter, or no search yet.

    See chapter 6, and Petrov et al., DAGER, NeurIPS 2024 for the attack this one builds on.
    """
    config = config or AttackConfig()
    begin = time.perf_counter()
    evidence = evidence_of(model, update)
    if not isinstance(evidence.adapter, DecoderAdapter):
        raise DagerError(
            f"model {model.name!r} is an encoder: its search is not part of this version; use a causal model"
        )
    return _Run(model, evidence.adapter, evidence, config, progress, begin).reconstruction()


@dataclass
class _Run:
    """One run on a causal model."""

    model: LanguageModel
    adapter: DecoderAdapter
    evidence: Evidence
    config: AttackConfig
    progress: Progress | None
    begin: float
    seconds: dict[str, float] = field(default_factory=lambda: {"subspace": 0.0, "filter": 0.0, "search": 0.0})

    def reconstruction(self) -> Reconstruction:
        tree, texts, status, diagnosis = self.search()
        sequences = [tree.nodes[index].tokens for index in texts.nodes]
        self.seconds["subspace"] = self.evidence.seconds
        self.seconds["total"] = time.perf_counter() - self.begin
        return Reconstruction(
            sequences=tuple(sequences),
            texts=tuple(self.model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sequences),
            scores=tuple(tree.nodes[index].ratio for index in texts.nodes),
            status=status,
            diagnosis=diagnosis,
            seconds=self.seconds,
            ranks={tap.name: span.rank for tap, span in self.evidence.spans.items() if span is not None},
            model=self.model.name,
            n_parameters_used=self.evidence.parameters_used,
            peak_rss_mb=peak_memory_mb(),
        )

    def search(self) -> tuple[Tree, Texts, str, str]:
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
        source, report = self.adapter.first_input, self._report("filter")
        if first.saturated:
            candidates = filter_by_leverage(source, first, late=self._late)
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
            deadline=self._deadline(),
            seed=self.config.seed,
            progress=self._report("search"),
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
            deadline=self._deadline(),
            seed=self.config.seed,
            progress=self._report("search"),
        )

    def _deadline(self) -> float | None:
        return None if self.config.time_budget is None else self.begin + self.config.time_budget

    def _late(self) -> bool:
        deadline = self._deadline()
        return deadline is not None and time.perf_counter() > deadline

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

    def _report(self, stage: str) -> Callable[[int, int | None], None] | None:
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(stage, done, total)


def expected_rows(spans: Any) -> int | None:
    """The number of distinct prefixes of the batch, where a rank with a clear gap tells it."""
    clear = [span.rank for span in spans if span.gap >= CLEAR_GAP and not span.saturated]
    return max(clear, default=None)


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


def peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
