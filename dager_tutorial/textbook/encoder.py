"""The paper's attack on encoders, written the obvious, slow way (chapter `08_encoder_recovery`).

Every token of an encoder sees the whole text, so that no part of a text can be tested before all of it is there. The
token filter tells which tokens may stand at each position and, by the end token, which lengths texts may have. For
each length every choice of one token a position is a text to run through block 0 and to test against the span of
block 1.

The choices are a product over the positions. Eight candidates at each of 20 positions are 1e18 texts; the paper's
way out, followed here as options, is to keep the nearest few tokens, to take the tokens of found texts away, and
to draw ten million texts at random where there are more. Each of them can lose texts. The attack of `server` does
without the product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.errors import DagerError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Certainty, Status
from dager_tutorial.stopwatch import Stopwatch
from dager_tutorial.textbook.block_inputs import TokenIds, batches, second_block_inputs
from dager_tutorial.textbook.choices import (
    EncoderSearchOptions,
    possible_lengths,
    search_size,
    texts_to_test,
    without_used,
)
from dager_tutorial.textbook.reconstruction import textbook_reconstruction
from dager_tutorial.textbook.spans import span_distance, textbook_spans
from dager_tutorial.textbook.token_filter import Progress, textbook_token_filter
from dager_tutorial.update import Update


@dataclass
class EncoderSearch:
    """What the search found, and how much of its space it saw.

    Attributes:
        confirmed: The texts that lie in the span of block 1, shorter ones first, each with its distance.
        tested: Number of texts that were run, repeated draws included.
        possible: Number of texts that there were to test.
        narrowed: Whether candidates were left out before the search began.
        late: Whether the time was spent before its end.
    """

    confirmed: dict[TokenIds, float] = field(default_factory=dict)
    tested: int = 0
    possible: int = 0
    narrowed: bool = False
    late: bool = False


@torch.no_grad()
def textbook_encoder_search(
    adapter: EncoderAdapter,
    basis: Float[Tensor, "width rank"],
    candidates: Sequence[Int[Tensor, " _"]],
    frame: tuple[int, int],
    *,
    threshold: float = 1e-3,
    options: EncoderSearchOptions | None = None,
    progress: Progress | None = None,
) -> EncoderSearch:
    """Test every text of every possible length.

    The work grows as candidates to the power of the length: five tokens at each of five positions are 3125 texts,
    ten at each of ten positions 10^10. The end token is tried at the end only.

    Args:
        adapter: The architecture.
        basis: float32, the span of block 1's attention inputs.
        candidates: int64 token ids for each position, nearest first, as `textbook_token_filter` returns them.
        frame: The token ids that begin and end every text, [CLS] and [SEP] of BERT.
        threshold: Mean relative distance of a text's rows from the span below which it passes (the paper's tau_2).
        options: What to leave out.
        progress: Called with "search", the number of texts tested and the most that can be.

    Returns:
        The confirmed texts.
    """
    options, (begin, end) = options or EncoderSearchOptions(), frame
    deadline = math.inf if options.time_budget is None else time.perf_counter() + options.time_budget
    everything = [[token for token in tokens.tolist() if token != end] for tokens in candidates]
    words = [tokens[: options.candidates_per_position] for tokens in everything]
    lengths = possible_lengths(candidates, begin, end)
    total = sum(min(search_size(words[1 : length - 1]), options.cap) for length in lengths)
    search = EncoderSearch(narrowed=words != everything)
    for length in lengths:
        choices = [[begin], *words[1 : length - 1], [end]]
        search.possible += search_size(choices)
        found: dict[TokenIds, float] = {}
        for texts in batches(texts_to_test(choices, options.cap, options.seed), length):
            search.late = time.perf_counter() > deadline
            if search.late:
                break
            distances = text_distances(adapter, basis, texts)
            found |= {text: distance for text, distance in distances.items() if distance < threshold}
            search.tested += len(texts)
            if progress:
                progress("search", search.tested, total)
        search.confirmed |= found
        if options.remove_used:
            words = without_used(words, found)
    return search


def text_distances(
    adapter: EncoderAdapter, basis: Float[Tensor, "width rank"], texts: Sequence[TokenIds]
) -> dict[TokenIds, float]:
    """Run texts of one length; the mean distance of each one's rows from the span of block 1.

    Args:
        adapter: The architecture.
        basis: float32, the span of block 1's attention inputs.
        texts: Token ids of texts of one length.
    """
    vectors = second_block_inputs(adapter, torch.tensor(texts, device=basis.device))
    distances = span_distance(vectors.flatten(0, 1), basis).unflatten(0, vectors.shape[:2])
    return dict(zip(texts, distances.mean(1).tolist(), strict=True))


def textbook_encoder_attack(
    model: LanguageModel,
    update: Update,
    *,
    span_threshold_0: float = 1e-5,
    span_threshold_1: float = 1e-3,
    rank_tolerance: float | None = None,
    rank_cutoff: int = 0,
    options: EncoderSearchOptions | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Recover the texts of a client's batch the way the paper describes, for encoders.

    As in `textbook_attack` the gradients of query, key and value are stacked. What this method does not see: how
    often a text occurs, texts made of two segments, and anything once a rank reaches the hidden size. Where block 1
    is the model's last and the loss reads the first position alone, a text adds one direction by its query and two
    by the keys and values of each head: a text with more tokens than that fails the test.

    Args:
        model: The model both sides know, with at least two blocks.
        update: What the client sent.
        span_threshold_0: Relative distance from the span of block 0 below which a token passes (tau_1).
        span_threshold_1: Mean relative distance from the span of block 1 below which a text passes (tau_2).
        rank_tolerance: See `textbook_span`.
        rank_cutoff: See `textbook_span`.
        options: What the search leaves out.
        progress: Called with the stage, how much is done and the total or None.

    Returns:
        The recovered sequences, each confirmed to its end by both spans. Scores are distances in units of
        `span_threshold_1`, all below 1. The status is texts_complete where the confirmed texts have as many tokens
        as the rank of block 1 tells.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: The model is causal, has one block only, its tokenizer does not put one token in front of a
            text and one behind, or its architecture has no adapter.

    See chapter `08_encoder_recovery`.
    """
    watch, options = Stopwatch(), options or EncoderSearchOptions()
    adapter = adapter_for(model.network)
    if not isinstance(adapter, EncoderAdapter):
        raise DagerError(f"model {model.name!r} is causal: textbook_attack searches its texts")
    frame = _frame(model)
    with watch.stage("subspace"):
        spans = textbook_spans(model, adapter, update, rank_tolerance, rank_cutoff)
    hopeless = spans.verdict()
    with watch.stage("filter"):
        candidates = [] if hopeless else textbook_token_filter(adapter, spans.bases[0], span_threshold_0, progress)
    with watch.stage("search"):
        left = options.after(time.perf_counter() - watch.begin)
        search = textbook_encoder_search(
            adapter, spans.bases[1], candidates, frame, threshold=span_threshold_1, options=left, progress=progress
        )
    scores = {text: distance / span_threshold_1 for text, distance in search.confirmed.items()}
    verdict = hopeless or _verdict(spans.ranks[1], search)
    return textbook_reconstruction(model, spans, scores, verdict, Certainty.WHOLE, watch)


def _frame(model: LanguageModel) -> tuple[int, int]:
    """The token ids that begin and end every text of a model: what the tokenizer makes of no text."""
    frame = model.tokenizer("")["input_ids"]
    if len(frame) != 2:
        raise DagerError(
            f"the tokenizer of model {model.name!r} adds {len(frame)} tokens to a text: "
            "the textbook search of encoders needs one in front and one behind"
        )
    return frame[0], frame[1]


def _verdict(rank: int, search: EncoderSearch) -> tuple[Status, str]:
    """Status and diagnosis, from the rank of block 1 and what was found."""
    if not search.possible:
        return Status.WRONG_MODEL, "no text from begin to end token lies in the span of block 0 at this threshold"
    rows = sum(map(len, search.confirmed))
    if not search.confirmed:
        found = "no text lies in the span of block 1 at this threshold"
    else:
        found = f"texts of {rows} tokens confirmed, where the rank of block 1 tells {rank}"
    return _status(rank, rows, search), f"{found}; {_seen(search)}"


def _status(rank: int, rows: int, search: EncoderSearch) -> Status:
    """Complete where the rows are counted; that no text passes blames the model only where all were tested."""
    if rows == rank:
        return Status.TEXTS_COMPLETE
    if search.late:
        return Status.OUT_OF_TIME
    all_tested = search.tested == search.possible and not search.narrowed
    return Status.WRONG_MODEL if all_tested and not search.confirmed else Status.PARTIAL


def _seen(search: EncoderSearch) -> str:
    """How much of the space was tested."""
    if search.tested == search.possible:
        return f"{search.tested} texts tested"
    return f"{search.tested} of about 10^{math.log10(search.possible):.1f} texts tested"
