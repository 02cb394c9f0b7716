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

    One block tells enough where little drifted, and costs little. That it did shows in the last block, at the ends,
    once texts with a wrong token were mended. Else a further block ranks, too, the tokens that the texts whose ends
    were told leave over. Such a text stays, unless there is a better one much like it.
    """
    clear = {tap: span for tap, span in last.items() if span.clear}
    block = _last_block(evidence, adapter, budget)
    neighbours = neighbours_of(evidence, adapter, clear, candidates, budget)
    deepest = max(1, min(constants().ranked_blocks, adapter.num_blocks - 1))  # of the last block its input counts
    search = BeamSearch(candidates, block, budget)
    near = _ranking(evidence, search, blocks=1)
    with evidence.watch.stage("search"):
        told = near is not None and _searched(search, Mender(near, block, candidates, budget))
        if not told and deepest > 1 and not budget.late:
            search.candidates = left_over(evidence, adapter, search.told, candidates)
            deep = _ranking(evidence, search, deepest)
            if deep is not None:
                _searched(search, Mender(deep, block, candidates, budget, thorough=True))
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


def _searched(search: BeamSearch, mender: Mender) -> bool:
    """Search, and mend by the same ranking; whether the last block tells where each of the texts ends."""
    search.run(mender.ranking)
    return search.mend(mender)


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
