"""The attack on causal models, stage by stage: spans, candidates, prefixes, whole texts.

Chapters `03_span`, `06_decoder_recovery` and `11_limits`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, QUERY, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.candidates import candidates_of, named_alone
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.beams import BeamSearch
from dager_tutorial.server.decoder.dropped import DroppedSelector
from dager_tutorial.server.decoder.ends import Texts, whole_texts
from dager_tutorial.server.decoder.front import FirstBlock
from dager_tutorial.server.decoder.narrow.run import text_that_explains
from dager_tutorial.server.decoder.neighbours import Neighbours
from dager_tutorial.server.decoder.ranking import Ranking
from dager_tutorial.server.decoder.residual import ResidualSelector
from dager_tutorial.server.decoder.search import TreeSearch
from dager_tutorial.server.decoder.summed.run import likely_prefixes
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import Ends, FoundText, Outcome, expected_rows
from dager_tutorial.server.prompt import explained
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates
from dager_tutorial.server.verdict import (
    no_beginning,
    no_candidates,
    of_leverage,
    of_prefixes,
    of_ranking,
    too_few_entries,
    unexplained,
    unreadable,
)
from dager_tutorial.status import Certainty, Confirmation, Status

Spans = dict[Tap, Span]


@dataclass(frozen=True)
class _Found:
    """The texts of a tree and what their places in it say."""

    tree: Tree
    texts: Texts
    tested: Spans
    last: Spans

    @property
    def ends(self) -> Ends:
        """What the last block says of the places where texts end."""
        clear = [span.rank for span in self.last.values() if span.clear]
        rank = None if self.texts.crowded else max(clear, default=None)
        return Ends(self.texts.seen, len(self.texts.confirmed), len(self.texts.nodes), rank)

    def outcome(self, status: Status, diagnosis: str) -> Outcome:
        """The texts with what confirms each, under a verdict."""
        found = (FoundText(self.tree.nodes[i].tokens, self.tree.nodes[i].ratio, self._by(i)) for i in self.texts.nodes)
        return Outcome(status, diagnosis, tuple(found))

    def _by(self, node: int) -> Confirmation:
        """What confirms a text: residuals its rows, the last block its end; leverages alone confirm nothing.

        Under strong noise a false end can pass in the last block, too: it confirms only where its own signal is clear
        and no more prefixes pass than it allows.
        """
        if node in self.texts.confirmed and self.ends.rank is not None:
            return Confirmation(Certainty.WHOLE, (*self.tested, *self.last))
        return Confirmation(Certainty.ROWS, tuple(self.tested)) if self.tested else Confirmation(Certainty.GUESS)


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
        return _by_rank(evidence, adapter, spans, candidates, last, budget)
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
        neighbours = _neighbours(evidence, adapter, last, candidates, budget)
        texts = whole_texts(adapter, tree, last, complete=complete, neighbours=neighbours)
        found = _Found(tree, texts, {} if saturated else spans, last)
    if not saturated:
        return _proven(evidence, adapter, found, expected, late=budget.late)
    likely = _likeliest(found)
    confirmed = len(likely.texts.confirmed)
    return likely.outcome(*of_leverage(likely.ends, confirmed, late=budget.late))


def ranked_prefixes(
    evidence: Evidence, adapter: DecoderAdapter, candidates: Candidates, budget: Budget
) -> list[tuple[int, ...]]:
    """Texts that may be there, by how well their prefixes fit where no gap stands below the signal.

    Args:
        evidence: The update's gradients.
        adapter: The architecture.
        candidates: Tokens that may stand at each position.
        budget: What it may cost.

    Returns:
        Token ids of the longest prefix of each, which may go beyond its end.
    """
    spans = evidence.present(*_cascade(evidence, adapter, budget), adapter.tap(0, MLP_OUTPUT))
    spans = {tap: span for tap, span in spans.items() if span.rank}
    if not spans:
        return []
    ranking = Ranking(spans, FirstBlock.screened(adapter, None, budget), candidates.distinct(), budget.generator())
    tree = BeamSearch(candidates, ranking, budget).run()
    return [tree.nodes[leaf].tokens for leaf in tree.leaves()]


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
        tree = Tree.of(found[0], rotary=adapter.first_input.positions is None)
        texts = whole_texts(adapter, tree, last, complete=found[1])
    if not found[1]:
        return _Found(tree, texts, {}, last).outcome(*unexplained(late=budget.late))
    explained = _Found(tree, texts, evidence.present(*taps), last)
    return explained.outcome(*of_prefixes(len(tree.real()), len(tree.real()), explained.ends, late=False))


def _proven(evidence: Evidence, adapter: DecoderAdapter, found: _Found, expected: int | None, *, late: bool) -> Outcome:
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
    """Whether inputs moved, or a grid rounds gradients, and no gap stands below any signal, though not all are full."""
    return (
        (bool(evidence.drifts) or evidence.bits is not None)
        and any(not span.saturated for span in spans.values())
        and not any(span.clear for span in spans.values())
    )


def _by_rank(
    evidence: Evidence, adapter: DecoderAdapter, spans: Spans, candidates: Candidates, last: Spans, budget: Budget
) -> Outcome:
    """The outcome of a search where no gap stands below the signal."""
    spans = evidence.present(*spans, adapter.tap(0, MLP_OUTPUT))
    with evidence.watch.stage("search"):
        ranking = Ranking(spans, FirstBlock.screened(adapter, None, budget), candidates.distinct(), budget.generator())
        tree = BeamSearch(candidates, ranking, budget).run()
        clear = {tap: span for tap, span in last.items() if span.clear}
        neighbours = _neighbours(evidence, adapter, clear, candidates, budget)
        likely = _likeliest(_Found(tree, whole_texts(adapter, tree, clear, neighbours=neighbours), {}, clear))
    if not likely.texts.nodes:
        return likely.outcome(*no_beginning(adapter, late=budget.late))
    return likely.outcome(*of_ranking(likely.ends, len(likely.texts.confirmed), late=budget.late))


def _neighbours(
    evidence: Evidence, adapter: DecoderAdapter, last: Spans, candidates: Candidates, budget: Budget
) -> Neighbours | None:
    """What proves ends where the client's steps moved the inputs; None where they did not, or no gap tells any."""
    clear = {tap: span for tap, span in last.items() if span.clear}
    return Neighbours(adapter, clear, candidates, budget.generator()) if evidence.drifts and clear else None


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


def _likeliest(found: _Found) -> _Found:
    """Of a search by leverage: what the last block confirms, then the likeliest others, as many as there are texts."""
    confirmed = [node for node in found.texts.nodes if node in found.texts.confirmed]
    rest = [node for node in found.texts.nodes if node not in found.texts.confirmed]
    rest.sort(key=lambda node: found.tree.nodes[node].ratio)
    room = max((span.rank for span in found.last.values()), default=constants().widest) - len(confirmed)
    kept = (*confirmed, *rest[: max(0, room)])
    return _Found(found.tree, replace(found.texts, nodes=kept), found.tested, found.last)
