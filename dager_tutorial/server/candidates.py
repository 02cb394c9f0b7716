"""Which tokens may stand where, by all that tells: block 0's span, the rows of embeddings, the tokenizer.

Chapters `05_token_filter` and `11_limits`.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from dager_tutorial.models.vocabulary import can_be_in_texts
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.embedding_rows import among, anywhere, named_positions, named_tokens
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates, filter_by_leverage, filter_tokens


def candidates_of(evidence: Evidence, first: Span | None, budget: Budget) -> Candidates:
    """Tokens that may stand at each position; none where nothing tells.

    Names are exact, but say only which tokens there are. So they go through the span test, where there is one: not
    where inputs moved, and not where the span is full.

    Args:
        evidence: The update's gradients.
        first: The span of block 0's query, key and value gradient, where it was shared.
        budget: What it may cost.
    """
    source, named = evidence.adapter.first_input, named_tokens(evidence)
    if first is None or not first.rank:
        return named_alone(evidence) or Candidates((source.tokens.new_empty(0).long(),), every_position=True)
    # Under noise of a grid the test adds nothing to names but positions, where block 0's inputs have any; and of a
    # gradient that was filled in, a thin part may be wrong.
    blunt = bool(evidence.drifts) or evidence.pruned or (evidence.bits is not None and source.positions is None)
    if named is not None and (blunt or first.saturated):
        positions = named_positions(evidence)
        if source.positions is None or positions is not None:
            return anywhere(named, positions)
    if not first.saturated:
        found = filter_tokens(source, first, budget, named)
    else:  # what stands out is told by what is usual in the whole vocabulary
        found = filter_by_leverage(source, first, budget)
    if not found.count:
        return found
    return among(found, _possible(evidence, found) if named is None else named)


def _possible(evidence: Evidence, candidates: Candidates) -> Int[Tensor, " tokens"]:
    """Those of the candidates' tokens that a text may have."""
    tokens = candidates.distinct()
    return tokens if evidence.tokenizer is None else tokens[can_be_in_texts(evidence.tokenizer, tokens)]


def named_alone(evidence: Evidence) -> Candidates | None:
    """What embeddings alone name, where block 0's query, key and value gradient says nothing; None where they do not.

    Args:
        evidence: The update's gradients.
    """
    named, positions = named_tokens(evidence), named_positions(evidence)
    if named is None or (positions is None and evidence.adapter.first_input.positions is not None):
        return None
    return anywhere(named, positions)
