"""The attack on causal models, stage by stage: spans, candidates, prefixes, whole texts.

Chapters `03_span`, `06_decoder_recovery` and `11_limits`.
"""

from __future__ import annotations

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, QUERY
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.candidates import candidates_of, named_alone
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.dropped import DroppedSelector
from dager_tutorial.server.decoder.ends import whole_texts
from dager_tutorial.server.decoder.found import Found, Spans, likeliest
from dager_tutorial.server.decoder.front import FirstBlock
from dager_tutorial.server.decoder.narrow.run import text_that_explains
from dager_tutorial.server.decoder.ranked import by_rank, neighbours_of
from dager_tutorial.server.decoder.residual import ResidualSelector
from dager_tutorial.server.decoder.search import TreeSearch
from dager_tutorial.server.decoder.summed.run import likely_prefixes
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.embedding_rows import named_tokens, noise_of
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import Outcome, expected_rows
from dager_tutorial.server.prompt import explained
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates
from dager_tutorial.server.verdict import (
    no_beginning,
    no_candidates,
    of_leverage,
    of_prefixes,
    too_few_entries,
    unexplained,
    unreadable,
)


def recover_prefixes(evidence: Evidence, budget: Budget, prompt: tuple[int, ...] = ()) -> Outcome:
    """Grow prefixes from the first token on, by residuals where there are any, else by the evidence of all taps.

    Args:
        evidence: The update's gradients.
        budget: What it may cost.
        prompt: Token ids with which every text is said to begin; where the update does not hold them they are left out.
    """
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    nothing, first = _of_first_block(evidence, adapter)
    full = first is not None and first.saturated
    if evidence.maps and first is not None and nothing is None:
        narrow = _of_narrow_adapter(evidence, adapter, first, budget)
        if narrow is not None:
            return narrow
    with evidence.watch.stage("filter"):
        candidates = candidates_of(evidence, first if nothing is None else None, budget)
    if not candidates.count:
        return no_candidates(late=budget.late, saturated=full) if nothing is None else nothing
    spans = _cascade(evidence, adapter, budget)
    if nothing is not None and not spans:
        return nothing
    if prompt and explained(evidence, [adapter.tap(0, QKV), *spans], prompt) == len(prompt):
        candidates = candidates.beginning(prompt)
    last = _last(evidence, adapter, budget)
    if budget.late:
        return Outcome(*no_beginning(adapter, late=True))
    if _without_gap(evidence, spans):
        return by_rank(evidence, adapter, candidates, last, budget)
    return _by_spans(evidence, adapter, spans, candidates, last, budget, full=full)


def _by_spans(
    evidence: Evidence,
    adapter: DecoderAdapter,
    spans: Spans,
    candidates: Candidates,
    last: Spans,
    budget: Budget,
    *,
    full: bool,
) -> Outcome:
    """The outcome of a search by residuals, or by the evidence of all taps where spans are full."""
    saturated, expected = full or any(span.saturated for span in spans.values()), expected_rows(spans.values())
    with evidence.watch.stage("search"):
        if not saturated:
            tree = _by_residual(adapter, spans, candidates, budget)
            # Without a clear gap noise may cut a full rank short: it shows in more prefixes passing than there can be.
            saturated = tree.overflowed and all(2 * span.rank >= span.width for span in spans.values())
        if saturated:
            tree = likely_prefixes(evidence, adapter, candidates, last, budget)
        elif (dropped := _under_dropout(evidence, adapter, candidates, tree, budget)) is not None:
            tree, spans, last = dropped, evidence.present(adapter.tap(0, ATTENTION_OUTPUT)), {}
        complete = not saturated and tree.distinct_rows() == expected
        neighbours = neighbours_of(evidence, adapter, last, candidates, budget)
        texts = whole_texts(adapter, tree, last, complete=complete, neighbours=neighbours)
        found = Found(tree, texts, {} if saturated else spans, last)
    if not saturated:
        return _proven(evidence, adapter, found, expected, late=budget.late)
    likely = likeliest(found)
    confirmed = len(likely.texts.confirmed)
    return likely.outcome(*of_leverage(likely.ends, confirmed, late=budget.late))


def _of_first_block(evidence: Evidence, adapter: DecoderAdapter) -> tuple[Outcome | None, Span | None]:
    """The span of block 0's query, key and value gradient, and the outcome where nothing can be searched without it.

    Where embeddings name the tokens of a pruned update, this large gradient need not be filled in.
    """
    if evidence.pruned and named_alone(evidence) is not None:
        return too_few_entries(), None
    return unreadable(evidence), evidence.span(adapter.tap(0, QKV))


def _of_narrow_adapter(evidence: Evidence, adapter: DecoderAdapter, first: Span, budget: Budget) -> Outcome | None:
    """The outcome where a trained adapter is too narrow for the rows of one text; None where that is not the case."""
    full = first.saturated or any(span.saturated for span in _cascade(evidence, adapter, budget).values())
    last = _last(evidence, adapter, budget)
    if not full or max((span.rank for span in last.values()), default=0) != 1:
        return None
    silent = {(adapter.num_blocks - 1, kind) for kind in (ATTENTION_OUTPUT, MLP)}
    taps = [tap for tap in adapter.taps() if (tap.block, tap.kind) not in silent]
    if len({tap.kind for tap in taps if evidence.shared(tap)}) < 2:  # one look at a row in each block is too little
        return None
    with evidence.watch.stage("search"):
        found = text_that_explains(evidence, adapter, taps, budget)
        if found is None or not found[0]:
            return None
        tree = Tree.of({found[0]: 1.0}, rotary=adapter.first_input.positions is None)
        texts = whole_texts(adapter, tree, last, complete=found[1])
    if not found[1]:
        return Found(tree, texts, {}, last).outcome(*unexplained(late=budget.late))
    explained = Found(tree, texts, evidence.present(*taps), last)
    return explained.outcome(*of_prefixes(len(tree.real()), len(tree.real()), explained.ends, late=False))


def _proven(evidence: Evidence, adapter: DecoderAdapter, found: Found, expected: int | None, *, late: bool) -> Outcome:
    """The outcome of a search by residuals."""
    if not found.texts.nodes:
        every, queries = adapter.tap(0, QKV), set(adapter.tap(0, QUERY).parameters)
        alone = evidence.shared(every) <= queries < set(every.parameters)
        return found.outcome(*no_beginning(adapter, late=late, queries=alone))
    return found.outcome(*of_prefixes(found.tree.distinct_rows(), expected, found.ends, late=late))


def _by_residual(adapter: DecoderAdapter, spans: Spans, candidates: Candidates, budget: Budget) -> Tree:
    """The prefixes that pass every span test."""
    expected = expected_rows(spans.values())
    selector = ResidualSelector(adapter, spans, budget, counted=expected is not None)
    return TreeSearch(candidates, selector, budget, expected).run()


def _under_dropout(
    evidence: Evidence, adapter: DecoderAdapter, candidates: Candidates, tree: Tree, budget: Budget
) -> Tree | None:
    """The prefixes that fit if the client drops attention weights; None where more fit if it does not.

    Block 0's attention output alone tells: deeper taps have masks, too, that nobody knows.
    """
    span = evidence.span(adapter.tap(0, ATTENTION_OUTPUT))
    if span is None or not span.clear or tree.overflowed or tree.distinct_rows() >= span.rank or evidence.pruned:
        return None
    selector = DroppedSelector(span, FirstBlock.screened(adapter, None, budget), adapter.max_positions - 1)
    dropped = TreeSearch(candidates, selector, budget, span.rank).run()
    return dropped if dropped.distinct_rows() > tree.distinct_rows() else None


def _without_gap(evidence: Evidence, spans: Spans) -> bool:
    """Whether inputs moved, or gradients hold noise or were rounded, and no gap stands below any signal.

    Not where all spans are full.
    """
    return (
        any(not span.saturated for span in spans.values())
        and not any(span.clear for span in spans.values())
        and (bool(evidence.drifts) or evidence.bits is not None or _named_in_noise(evidence))
    )


def _named_in_noise(evidence: Evidence) -> bool:
    """Whether a rotary model's tokens stand out of noise: where positions are learned, rows see through it sooner."""
    rotary = evidence.adapter.first_input.positions is None
    return rotary and noise_of(evidence) is not None and named_tokens(evidence) is not None


def _cascade(evidence: Evidence, adapter: DecoderAdapter, budget: Budget) -> Spans:
    """Spans of the taps that the search tests; the MLP's only where one of the others cannot decide alone.

    The taps of an adapter hold different numbers of directions: those that are full say nothing, and are left out where
    others are not.
    """
    deeper = [adapter.tap(1, QKV)] if adapter.num_blocks > 1 else []
    spans: Spans = {}
    for tap in (adapter.tap(0, ATTENTION_OUTPUT), *deeper, adapter.tap(0, MLP)):
        # Where entries are missing to fill a gradient costs more than to search with one tap less.
        enough = 1 if evidence.pruned else 2
        decided = len(spans) >= enough and all(span.clear for span in spans.values())
        if not budget.late and not (
            decided and (tap.kind == MLP or evidence.pruned)
        ):  # a span of a wide model takes a minute
            spans |= evidence.present(tap)
    roomy = {tap: span for tap, span in spans.items() if not span.saturated}
    return roomy if evidence.maps and roomy else spans


def _last(evidence: Evidence, adapter: DecoderAdapter, budget: Budget) -> Spans:
    """Spans that tell where texts end: of the last block, as far as it was shared and is not full.

    The attention's output map decides alone where it can tell; in low precision neighbours are too alike in it.
    """
    spans: Spans = {}
    for kind in (ATTENTION_OUTPUT, QUERY):
        tap = adapter.tap(adapter.num_blocks - 1, kind)
        span = None if budget.late else evidence.span(tap)
        if span is not None and not span.saturated:
            spans[tap] = span
            if span.between >= constants().clear_gap * span.bound:
                break
    return spans
