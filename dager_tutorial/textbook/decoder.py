"""The paper's attack on causal models, written the obvious, slow way (chapter `06_decoder_recovery`).

A filter tests the vocabulary position by position against the span of block 0, and a search from left to right tests
whole prefixes against that of block 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.errors import DagerError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Certainty, Status
from dager_tutorial.stopwatch import Stopwatch
from dager_tutorial.textbook.block_inputs import TokenIds, batches, is_rotary, second_block_inputs
from dager_tutorial.textbook.reconstruction import textbook_reconstruction
from dager_tutorial.textbook.spans import span_distance, textbook_spans
from dager_tutorial.textbook.token_filter import Progress, textbook_token_filter
from dager_tutorial.update import Update

REPEATS_FOLLOWED = 8
"""How often a rotary model's first token may be repeated before the search stops following it."""


@torch.no_grad()
def textbook_decoder_search(
    adapter: DecoderAdapter,
    basis: Float[Tensor, "width rank"],
    candidates: Sequence[Int[Tensor, " _"]],
    threshold: float = 1e-3,
    progress: Progress | None = None,
) -> dict[TokenIds, float]:
    """Extend every confirmed prefix by every candidate of the next position, until no extension is confirmed.

    With rotary positions a first token has the same state however often it is repeated ([A], [A, A], ...), so
    that all of these pass if one does. Here such a prefix is followed up to a length of 8.

    Args:
        adapter: The architecture.
        basis: float32, the span of block 1's attention inputs.
        candidates: int64 token ids for each position, as `textbook_token_filter` returns them.
        threshold: Relative distance from the span below which a prefix passes (the paper's tau_2).
        progress: Called with "search", the number of confirmed prefixes and None.

    Returns:
        Every confirmed prefix, shorter ones first, with the largest distance on its way.
    """
    confirmed: dict[TokenIds, float] = {}
    front: dict[TokenIds, float] = {(): 0.0}
    for tokens in candidates:
        extended = [(*prefix, token) for prefix in front for token in tokens.tolist()]
        if is_rotary(adapter):
            extended = [prefix for prefix in extended if len(prefix) <= REPEATS_FOLLOWED or not is_repeat(prefix)]
        distances = prefix_distances(adapter, basis, extended)
        passing = {prefix: distance for prefix, distance in distances.items() if distance < threshold}
        front = {prefix: max(distance, front[prefix[:-1]]) for prefix, distance in passing.items()}
        if not front:
            break
        confirmed |= front
        if progress:
            progress("search", len(confirmed), None)
    return confirmed


def prefix_distances(
    adapter: DecoderAdapter, basis: Float[Tensor, "width rank"], prefixes: Sequence[TokenIds]
) -> dict[TokenIds, float]:
    """Run whole prefixes of one length; the distance of each one's last row from the span of block 1.

    Args:
        adapter: The architecture.
        basis: float32, the span of block 1's attention inputs.
        prefixes: Token ids of prefixes of one length.
    """
    distances: list[float] = []
    for batch in batches(prefixes, len(prefixes[0]) if prefixes else 1):
        vectors = second_block_inputs(adapter, torch.tensor(batch, device=basis.device))
        distances += span_distance(vectors[:, -1], basis).tolist()
    return dict(zip(prefixes, distances, strict=True))


def is_repeat(prefix: TokenIds) -> bool:
    """Whether a prefix is one token, repeated.

    >>> is_repeat((7,)), is_repeat((7, 7)), is_repeat((7, 7, 8))
    (False, True, False)
    """
    return len(prefix) > 1 and len(set(prefix)) == 1


def longest_prefixes(prefixes: Iterable[TokenIds]) -> list[TokenIds]:
    """The prefixes that begin no other one: the texts.

    >>> longest_prefixes([(1,), (3,), (1, 1), (1, 2), (1, 2, 4)])
    [(3,), (1, 1), (1, 2, 4)]
    """
    prefixes = list(prefixes)
    beginnings = {prefix[:length] for prefix in prefixes for length in range(len(prefix))}
    return [prefix for prefix in prefixes if prefix not in beginnings]


def textbook_attack(
    model: LanguageModel,
    update: Update,
    *,
    span_threshold_0: float = 1e-5,
    span_threshold_1: float = 1e-3,
    rank_tolerance: float | None = None,
    rank_cutoff: int = 0,
    progress: Progress | None = None,
) -> Reconstruction:
    """Recover the texts of a client's batch the way the paper describes, for causal models.

    One thing differs: the paper states Theorem 5.1 for the gradient of the query map. A softmax over one key
    is constant, so that the first token of a text has no query gradient: position 0 of GPT-2, and a token of
    Llama that only begins texts, could not be found. Here the gradients of query, key and value are stacked,
    which share their inputs and so their span.

    What this method does not see: a text that begins another one, how often a text occurs, with rotary
    positions how often its only token is repeated, and anything once a rank reaches the hidden size.

    Args:
        model: The model both sides know, with at least two blocks.
        update: What the client sent.
        span_threshold_0: Relative distance from the span of block 0 below which a token passes (tau_1).
        span_threshold_1: Relative distance from the span of block 1 below which a prefix passes (tau_2).
        rank_tolerance: See `textbook_span`.
        rank_cutoff: See `textbook_span`.
        progress: Called with the stage, how much is done and None.

    Returns:
        The recovered sequences, all of whose rows are confirmed by both spans. Scores are distances in units of
        `span_threshold_1`, all below 1. The status is rows_complete where as many prefixes are confirmed as the
        rank of block 1 tells.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: The model is an encoder (see `textbook.encoder`), has one block only, or its architecture has
            no adapter.

    See chapters `03_span`, `05_token_filter` and `06_decoder_recovery`.
    """
    watch = Stopwatch()
    adapter = adapter_for(model.network)
    if not isinstance(adapter, DecoderAdapter):
        raise DagerError(f"model {model.name!r} is an encoder: textbook_encoder_attack searches its texts")
    with watch.stage("subspace"):
        spans = textbook_spans(model, adapter, update, rank_tolerance, rank_cutoff)
    hopeless = spans.verdict()
    with watch.stage("filter"):
        candidates = [] if hopeless else textbook_token_filter(adapter, spans.bases[0], span_threshold_0, progress)
    with watch.stage("search"):
        confirmed = textbook_decoder_search(adapter, spans.bases[1], candidates, span_threshold_1, progress)
    rows = [prefix for prefix in confirmed if not (is_rotary(adapter) and is_repeat(prefix))]
    scores = {text: confirmed[text] / span_threshold_1 for text in longest_prefixes(rows)}
    verdict = hopeless or _verdict(spans.ranks[1], len(rows))
    return textbook_reconstruction(model, spans, scores, verdict, Certainty.ROWS, watch)


def _verdict(rank: int, rows: int) -> tuple[Status, str]:
    """Status and diagnosis, from the rank of block 1 and the number of confirmed prefixes."""
    if rows == 0:
        return Status.WRONG_MODEL, "no first token lies in both spans at these thresholds"
    status = Status.ROWS_COMPLETE if rows == rank else Status.PARTIAL
    return status, f"{rows} prefixes confirmed, where the rank of block 1 tells {rank}"
