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
from .sentences import Texts, whole_texts
from .subspace import CLEAR_GAP, Span
from .token_filter import filter_tokens
from .update import Update

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
        nothing = Tree(), Texts((), ())
        if first is None or first.rank == 0:
            return (
                *nothing,
                "no_signal",
                "block 0's query, key and value gradients are missing or zero: nothing to test tokens against",
            )
        spans = self._cascade_spans()
        start = time.perf_counter()
        candidates = filter_tokens(
            self.adapter.first_input, first, seed=self.config.seed, progress=self._report("filter")
        )
        self.seconds["filter"] = time.perf_counter() - start
        if not candidates.count:
            return (
                *nothing,
                "no_candidates",
                "no token of the vocabulary lies in the span of block 0: another model, or too much noise",
            )
        last = self._last_spans()
        start, before = time.perf_counter(), self.evidence.seconds
        budget = self.config.time_budget
        expected = expected_rows(spans.values())
        tree = PrefixSearch(
            self.adapter,
            spans,
            candidates,
            expected_rows=expected,
            memory=self.config.memory_mb * 2**20,
            deadline=None if budget is None else self.begin + budget,
            seed=self.config.seed,
            progress=self._report("search"),
        ).run()
        texts = whole_texts(self.adapter, tree, last)
        self.seconds["search"] = time.perf_counter() - start - (self.evidence.seconds - before)
        status, diagnosis = verdict(tree, texts, expected)
        return tree, texts, status, diagnosis

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
        """Spans that tell where texts end: of the last block, as far as it was shared and is not full."""
        block = self.adapter.num_blocks - 1
        spans = {self.adapter.tap(block, kind): self.evidence.span(block, kind) for kind in (ATTENTION_OUTPUT, QUERY)}
        return {tap: span for tap, span in spans.items() if span is not None and not span.saturated}

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
    if not all(texts.confirmed):
        return "partial", "a text ends where the last block sees no end"
    return "exact", f"all {expected} distinct prefixes are explained"


def peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
