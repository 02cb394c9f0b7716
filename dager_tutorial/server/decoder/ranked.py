"""The search where no gap stands below the signal: texts by how well the taps of the first blocks rank them.

Chapter `12_federated`.
"""

from __future__ import annotations

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP_OUTPUT, QUERY
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.beams import BeamSearch
from dager_tutorial.server.decoder.ends import whole_texts
from dager_tutorial.server.decoder.found import Found, Spans, likeliest
from dager_tutorial.server.decoder.last_block import LastBlock
from dager_tutorial.server.decoder.left_over import left_over
from dager_tutorial.server.decoder.mending import Mender
from dager_tutorial.server.decoder.neighbours import Neighbours
from dager_tutorial.server.decoder.passage import Passage
from dager_tutorial.server.decoder.ranking import Misfit, Ranking, ranked_taps
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import Outcome
from dager_tutorial.server.token_filter import Candidates
from dager_tutorial.server.verdict import no_beginning, of_ranking

_KINDS = (ATTENTION_OUTPUT, QUERY, MLP_OUTPUT)  # the MLP's input is hardly wider than the noise of all rows


def by_rank(
    evidence: Evidence, adapter: DecoderAdapter, candidates: Candidates, last: Spans, budget: Budget
) -> Outcome:
    """The outcome of a search where no gap stands below the signal.

    Texts whose ends the last block sees stay; those that it tells leave their tokens over for a further search.
    """
    clear = {tap: span for tap, span in last.items() if span.clear}
    block = _last_block(evidence, adapter, budget)
    neighbours = neighbours_of(evidence, adapter, clear, candidates, budget)
    search, rounds, before = BeamSearch(candidates, block, budget), _rounds(adapter), 0
    with evidence.watch.stage("search"):
        for blocks in rounds:
            search.candidates = left_over(evidence, adapter, search.told, candidates, search.untold)
            if blocks == before and search.candidates is candidates:
                break  # nothing was learned
            if searched(evidence, search, blocks, last=blocks == rounds[-1]) or budget.late:
                break
            before = blocks
        tree = search.tree
        texts = whole_texts(adapter, tree, clear, neighbours=neighbours)
    likely = likeliest(Found(tree, texts, {}, clear))
    if not likely.texts.nodes:
        return likely.outcome(*no_beginning(adapter, late=budget.late))
    return likely.outcome(*of_ranking(likely.ends, len(likely.texts.confirmed), late=budget.late))


def _last_block(evidence: Evidence, adapter: DecoderAdapter, budget: Budget) -> LastBlock:
    """What tells ends: the taps of the last block that have room, however much noise there is."""
    taps = [] if budget.late else [adapter.tap(adapter.num_blocks - 1, kind) for kind in _KINDS]
    spans = evidence.present(*taps)
    return LastBlock(adapter, {tap: span for tap, span in spans.items() if span.rank and not span.saturated})


def _rounds(adapter: DecoderAdapter) -> tuple[int, ...]:
    """By the taps of how many blocks texts are ranked, one search after the other.

    Where positions are learned, one block tells enough if little drifted, and costs little. Where they enter in the
    attention only, block 0 says little of the order.
    """
    deepest = max(1, min(constants().ranked_blocks, adapter.num_blocks - 1))  # of the last block its input counts
    if deepest == 1:
        return (1,)
    return (deepest, deepest) if adapter.first_input.positions is None else (1, deepest)


def searched(evidence: Evidence, search: BeamSearch, blocks: int, *, last: bool) -> bool:
    """Search by the taps of so many blocks, and mend; whether the last block tells where each of the texts ends.

    Where a first search leaves more ends open than it tells, there is too much to mend, and a deeper one begins anew,
    if there is time for it.

    Args:
        evidence: The update's gradients.
        search: What it found before, and finds now.
        blocks: How many blocks.
        last: Whether none follows.
    """
    ranking = _ranking(evidence, search, blocks)
    if ranking is None:
        return False
    search.run(ranking)
    if not last and not search.budget.late and 2 * len(search.told) < len(search.texts):
        search.texts.clear()
        return False
    return search.mend(Mender(ranking, search.last, search.candidates, search.budget, thorough=last))


def _ranking(evidence: Evidence, search: BeamSearch, blocks: int) -> Ranking | None:
    """What weighs extensions by the taps of so many blocks; None where none of them was shared."""
    adapter = search.last.adapter
    present = evidence.present(*ranked_taps(adapter, blocks))
    ranked = {tap: span for tap, span in present.items() if span.rank}
    if not ranked:
        return None
    # Leverages of a full span say little beside residuals, and ask for all of its directions.
    spans = {tap: span for tap, span in ranked.items() if not span.saturated} or ranked
    passage = Passage(adapter, {tap: Misfit(span) for tap, span in spans.items()}, search.budget, blocks=blocks)
    return Ranking(passage, search.candidates.distinct(), search.budget.generator())


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
    last = _last_block(evidence, adapter, budget)
    search = BeamSearch(candidates, last, budget)
    ranking = _ranking(evidence, search, blocks=1)
    with evidence.watch.stage("search"):
        if ranking is not None:
            search.run(ranking)
    tree = search.tree
    return [tree.nodes[leaf].tokens for leaf in tree.leaves()]


def neighbours_of(
    evidence: Evidence, adapter: DecoderAdapter, last: Spans, candidates: Candidates, budget: Budget
) -> Neighbours | None:
    """What proves ends where the client's steps moved the inputs; None where they did not, or no gap tells any."""
    clear = {tap: span for tap, span in last.items() if span.clear}
    return Neighbours(adapter, clear, candidates, budget.generator()) if evidence.drifts and clear else None
