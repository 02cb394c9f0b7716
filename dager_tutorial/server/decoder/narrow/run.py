"""From the gradients of a narrow adapter to the text that explains them (chapter `11_limits`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import QKV, Tap, precise
from dager_tutorial.server.adapter_reading import adapter_names
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.narrow.search import NarrowSearch, readable
from dager_tutorial.server.decoder.narrow.wanted import Wanted
from dager_tutorial.server.decoder.passage import Passage, Prefix
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.rounding import probe


def text_that_explains(
    evidence: Evidence, adapter: DecoderAdapter, taps: list[Tap], budget: Budget
) -> tuple[Prefix, bool] | None:
    """Search for one text whose rows explain all directions that an adapter sends.

    Args:
        evidence: The gradients of the adapter, of a batch of one text.
        adapter: The architecture.
        taps: Where every row of the text may have a gradient, in the order of the forward pass.
        budget: What it may cost.

    Returns:
        The likeliest text and whether it explains everything; None where nothing is to be explained that is known of:
        neither A's gradients, which are zero in a fresh adapter, nor those of B in a model without rotary positions.
    """
    deepest = constants().ranked_blocks
    read = [tap for tap in taps if tap.block < deepest or (tap.block, tap.kind) == (deepest, QKV)]
    usual = _usual(adapter, read)
    wanted = _of_inputs(evidence, usual) or _of_keys(evidence, adapter, usual)
    if not readable(wanted):
        return None
    passage = Passage(adapter, dict.fromkeys(list(wanted)[1:], torch.clone), budget, deepest)
    return NarrowSearch(passage, wanted, budget, budget.generator()).run()


def _of_inputs(evidence: Evidence, usual: Mapping[Tap, Tensor]) -> dict[Tap, list[Wanted]]:
    """What the gradients of A say, which are combinations of the taps' inputs."""
    gradients = {tap: each for tap in usual if (each := evidence.of_downs(tap)) is not None and bool(each.any())}
    precision = torch.finfo(evidence.precision).eps
    found = {tap: Wanted.of(each, usual[tap], precision) for tap, each in gradients.items()}
    return {tap: [each] for tap, each in found.items() if len(each.directions)}


def _of_keys(evidence: Evidence, adapter: DecoderAdapter, usual: Mapping[Tap, Tensor]) -> dict[Tap, list[Wanted]]:
    """What the gradients of B say of a fused query, key and value: those of queries are combinations of keys.

    Behind rotations they are combinations of every key at every distance, too many to be told apart.
    """
    if adapter.first_input.positions is None:
        return {}
    fused = {
        tap: evidence.gradients.get(adapter_names(tap.parameters[0])[1])
        for tap in usual
        if tap.kind == QKV and len(tap.parameters) == 1
    }
    sent = {tap: precise(each[: adapter.hidden_size]) for tap, each in fused.items() if each is not None}
    precision = torch.finfo(evidence.precision).eps

    def of_heads(tap: Tap) -> list[Wanted]:
        heads = sent[tap].unflatten(0, (adapter.num_heads, adapter.head_width))
        maps = _key_maps(adapter, tap.block)
        return [
            Wanted.of(own.T, usual[tap], precision, each) for own, each in zip(heads, maps, strict=True) if own.any()
        ]

    found = {tap: [each for each in of_heads(tap) if len(each.directions)] for tap in sent}
    return {tap: each for tap, each in found.items() if each}


def _key_maps(adapter: DecoderAdapter, block: int) -> Float[Tensor, "heads inputs head_width"]:
    """The linear part of the keys, head by head: their bias is in no query's gradient, as softmax weights sum to 1."""
    eye = torch.eye(adapter.hidden_size).to(adapter.first_input.tokens)
    with torch.no_grad():
        keys = adapter.query_key_value(block, torch.cat([eye, 0 * eye[:1]]))[1]
    return (keys[:-1] - keys[-1:]).transpose(0, 1)


def _usual(adapter: DecoderAdapter, taps: list[Tap]) -> dict[Tap, Tensor]:
    """What enters taps in random texts."""
    ids = probe(adapter, constants().whitening_texts, constants().null_length, seed=3)
    inputs = adapter.tap_inputs(ids, torch.ones_like(ids), taps) if taps else {}
    return {tap: each.flatten(0, 1) for tap, each in inputs.items()}
