"""Putting the textbook's answer together."""

from __future__ import annotations

from collections.abc import Mapping

from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.stopwatch import Stopwatch, peak_memory_mb
from dager_tutorial.textbook.block_inputs import TokenIds
from dager_tutorial.textbook.spans import TextbookSpans


def textbook_reconstruction(
    model: LanguageModel,
    spans: TextbookSpans,
    scores: Mapping[TokenIds, float],
    verdict: tuple[Status, str],
    certainty: Certainty,
    watch: Stopwatch,
) -> Reconstruction:
    """The record of a run.

    Args:
        model: The model both sides know.
        spans: The spans that the search used.
        scores: The recovered sequences, each with its score. All of them lie in both spans.
        verdict: Status and diagnosis.
        certainty: How much of a text this confirms.
        watch: The stages "subspace", "filter" and "search".
    """
    status, diagnosis = verdict
    return Reconstruction(
        sequences=tuple(scores),
        texts=tuple(map(model.text_of, scores)),
        scores=tuple(scores.values()),
        status=status,
        confirmations=(Confirmation(certainty, spans.taps),) * len(scores),
        diagnosis=diagnosis,
        seconds=watch.report("subspace", "filter", "search"),
        ranks=dict(zip(spans.taps, spans.ranks, strict=True)),
        model=model.name,
        n_parameters_used=spans.parameters_used,
        peak_rss_mb=peak_memory_mb(),
    )
