"""The attack on a causal model that trains with dropout behind its embeddings: rows with their masks, then texts.

Chapter `11_limits`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import QKV
from dager_tutorial.server.constants import constants
from dager_tutorial.server.dropout.grouping import Chain, chains
from dager_tutorial.server.dropout.rows import Row, masked_rows
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import FoundText, Outcome
from dager_tutorial.server.verdict import no_candidates, unreadable
from dager_tutorial.status import Certainty, Confirmation, Status


def recover_masked(evidence: Evidence, rate: float) -> Outcome:
    """Read rows with their masks, and put them together to texts.

    Args:
        evidence: The update's gradients.
        rate: The rate of the dropout.
    """
    tap = evidence.adapter.tap(0, QKV)
    with evidence.watch.stage("filter"):
        nothing, span = unreadable(evidence), evidence.span(tap)
        rows = [] if nothing is not None or span is None or span.saturated else masked_rows(evidence, span, rate)
    if nothing is not None or span is None:
        return nothing or no_candidates(late=False, saturated=False)
    if not rows:
        return no_candidates(late=False, saturated=span.saturated)
    with evidence.watch.stage("search"):
        found = chains(evidence, rows)
    # A text ends where no row is left that goes on with it: only if all rows are known.
    every = span.clear and len(rows) == span.rank == sum(len(chain.rows) for chain in found)
    texts = tuple(_text(chain, rows, evidence, every=every) for chain in found)
    proven = sum(text.confirmation.certainty is not Certainty.GUESS for text in texts)
    said = f"dropout at a rate of {rate:.2f}: {len(rows)} of {span.rank} rows read with their masks, "
    said += f"{proven} of {len(texts)} texts held together by their queries' gradients"
    return Outcome(Status.TEXTS_COMPLETE if every and proven == len(texts) else Status.PARTIAL, said, texts)


def _text(chain: Chain, rows: Sequence[Row], evidence: Evidence, *, every: bool) -> FoundText:
    """A text, confirmed where every row but the first asks for keys of the text alone."""
    mine = [rows[place] for place in chain.rows]
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    linked = all(misfit <= constants().row_rounding for misfit in chain.misfits)
    # As many keys as a head is wide explain any query.
    linked = linked and 4 * len(mine) <= 3 * adapter.head_width
    certainty = Certainty.GUESS if not linked else Certainty.WHOLE if every else Certainty.ROWS
    taps = () if certainty is Certainty.GUESS else (adapter.tap(0, QKV),)
    return FoundText(tuple(row.token for row in mine), max(row.ratio for row in mine), Confirmation(certainty, taps))
