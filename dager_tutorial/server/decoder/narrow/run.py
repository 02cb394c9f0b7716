"""From the gradients of a narrow adapter to the text that explains them (chapter `11_limits`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.narrow.search import NarrowSearch, Prefix, readable
from dager_tutorial.server.decoder.narrow.wanted import Wanted
from dager_tutorial.server.decoder.summed.passage import Passage
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.rounding import probe


def text_that_explains(
    evidence: Evidence, adapter: DecoderAdapter, taps: list[Tap], budget: Budget
) -> tuple[Prefix, bool] | None:
    """Search for one text whose rows explain all directions that an adapter's A sends.

    Args:
        evidence: The gradients of the adapter, of a batch of one text.
        adapter: The architecture.
        taps: Where every row of the text may have a gradient, in the order of the forward pass.
        budget: What it may cost.

    Returns:
        The likeliest text and whether it explains everything; None where A's gradients are zero, as those of a fresh
        adapter are, or not shared for block 0.
    """
    gradients = {tap: each for tap in taps if (each := evidence.of_downs(tap)) is not None and bool(each.any())}
    if not gradients:
        return None
    wanted = _wanted(adapter, gradients, torch.finfo(evidence.precision).eps)
    if not readable(wanted):
        return None
    readers = dict.fromkeys(list(wanted)[1:], torch.clone)
    return NarrowSearch(Passage(adapter, readers, budget), wanted, budget, budget.generator()).run()


def _wanted(adapter: DecoderAdapter, gradients: Mapping[Tap, Tensor], precision: float) -> dict[Tap, Wanted]:
    """What is to be explained, beside what vectors of random texts are."""
    ids = probe(adapter, constants().whitening_texts, constants().null_length, seed=3)
    usual = adapter.tap_inputs(ids, torch.ones_like(ids), gradients)
    found = {tap: Wanted.of(each, usual[tap].flatten(0, 1), precision) for tap, each in gradients.items()}
    return {tap: each for tap, each in found.items() if len(each.directions)}
