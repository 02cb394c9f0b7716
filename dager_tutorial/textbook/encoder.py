"""The paper's attack on encoders, written the obvious, slow way (chapter 5).

Petrov et al., DAGER, NeurIPS 2024 (arXiv 2405.15586): every token of an encoder sees the whole text, so that no
part of a text can be tested before all of it is there. The token filter tells which tokens may stand at each
position and, by the end token, which lengths texts may have. For each length every choice of one token a position
is a text to run through block 0 and to test against the span of block 1.

The choices are a product over the positions. Eight candidates at each of 20 positions are 1e18 texts; the paper's
way out, followed here as options, is to keep the nearest few tokens, to take the tokens of found texts away, and
to draw ten million texts at random where there are more. Each of them can lose texts. `encoder` does without the
product.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice, product

import torch
from torch import Tensor

from dager_tutorial.errors import DagerError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.textbook.decoder import (
    TOKENS_AT_ONCE,
    Progress,
    second_block_inputs,
    span_distance,
    textbook_reconstruction,
    textbook_spans,
    textbook_token_filter,
)
from dager_tutorial.update import Update

Text = tuple[int, ...]


def search_size(choices: Iterable[Sized]) -> int:
    """How many texts have one of the candidates at each position: their product, exactly.

    Args:
        choices: The candidates of each position.

    Example:
        >>> search_size([[101], [7, 8, 9], [7, 8], [102]])
        6
        >>> search_size([range(105)] * 20) > 10**40
        True
    """
    return math.prod(map(len, choices))


@dataclass(frozen=True)
class EncoderSearchOptions:
    """What the search leaves out. The defaults leave out nothing, up to ten million texts of each length.

    Attributes:
        candidates_per_position: Keep so many tokens of each position, those nearest to the span of block 0. All
            that pass lie as near as rounding lets them, so that this is close to a random choice. The paper keeps
            as many as the batch has texts, which the server does not know. None: all.
        cap: Most texts of one length that are tested; where there are more, so many are drawn at random.
        remove_used: Take the tokens of the texts found so far away from their positions before the next length
            is searched, as long as a position keeps one. A longer text with one of them at its place is lost.
        seed: Seed of the random draws.

    Raises:
        DagerError: A number is smaller than one.
    """

    candidates_per_position: int | None = None
    cap: int = 10_000_000
    remove_used: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to search."""
        for name in ("candidates_per_position", "cap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DagerError(f"{name} is {value}: give at least 1")


@dataclass
class EncoderSearch:
    """What the search found, and how much of its space it saw.

    Attributes:
        confirmed: The texts that lie in the span of block 1, shorter ones first, each with its distance.
        tested: Number of texts that were run, repeated draws included.
        possible: Number of texts that there were to test.
    """

    confirmed: dict[Text, float] = field(default_factory=dict)
    tested: int = 0
    possible: int = 0


def possible_lengths(candidates: Sequence[Tensor], begin: int, end: int) -> list[int]:
    """The lengths that texts may have: the end token passed at their last position, the begin token at the first.

    Args:
        candidates: int64 token ids for each position.
        begin: Token id that begins every text, [CLS] of BERT.
        end: Token id that ends every text, [SEP] of BERT.

    Example:
        >>> possible_lengths([torch.tensor([101]), torch.tensor([7, 8]), torch.tensor([102, 9])], 101, 102)
        [3]
    """
    if not len(candidates) or begin not in candidates[0]:
        return []
    return [position + 1 for position, tokens in enumerate(candidates) if position and end in tokens]


@torch.no_grad()
def textbook_encoder_search(
    adapter: Adapter,
    basis: Tensor,
    candidates: Sequence[Tensor],
    begin: int,
    end: int,
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
        basis: float32, width x rank, the span of block 1's attention inputs.
        candidates: int64 token ids for each position, nearest first, as `textbook_token_filter` returns them.
        begin: Token id that begins every text, [CLS] of BERT.
        end: Token id that ends every text, [SEP] of BERT.
        threshold: Mean relative distance of a text's rows from the span below which it passes (the paper's tau_2).
        options: What to leave out.
        progress: Called with "search", the number of texts tested and the most that can be.

    Returns:
        The confirmed texts.
    """
    options = options or EncoderSearchOptions()
    words = [[token for token in tokens.tolist() if token != end] for tokens in candidates]
    words = [tokens[: options.candidates_per_position] for tokens in words]
    lengths = possible_lengths(candidates, begin, end)
    total = sum(min(search_size(words[1 : length - 1]), options.cap) for length in lengths)
    search = EncoderSearch()
    for length in lengths:
        choices = [[begin], *words[1 : length - 1], [end]]
        found: dict[Text, float] = {}
        for texts in _batches(texts_to_test(choices, options.cap, options.seed), TOKENS_AT_ONCE // length + 1):
            distances = text_distances(adapter, basis, texts)
            found |= {text: distance for text, distance in distances.items() if distance < threshold}
            search.tested += len(texts)
            if progress:
                progress("search", search.tested, total)
        search.possible += search_size(choices)
        search.confirmed |= found
        if options.remove_used:
            words = without_used(words, found)
    return search


def texts_to_test(choices: Sequence[Sequence[int]], cap: int, seed: int) -> Iterator[Text]:
    """Every text of one length, or as many as `cap` random ones where there are more.

    Draws are independent, so that a text may come twice.

    Args:
        choices: Token ids that may stand at each position.
        cap: Most texts to give.
        seed: Seed of the draws.

    Example:
        >>> list(texts_to_test([[101], [7, 8], [102]], cap=2, seed=0))
        [(101, 7, 102), (101, 8, 102)]
    """
    if search_size(choices) <= cap:
        yield from product(*choices)
        return
    chance = random.Random(seed)
    for _ in range(cap):
        yield tuple(chance.choice(tokens) for tokens in choices)


def text_distances(adapter: Adapter, basis: Tensor, texts: Sequence[Text]) -> dict[Text, float]:
    """Run texts of one length; the mean distance of each one's rows from the span of block 1.

    Args:
        adapter: The architecture.
        basis: float32, width x rank, the span of block 1's attention inputs.
        texts: Token ids of texts of one length.
    """
    vectors = second_block_inputs(adapter, torch.tensor(texts, device=basis.device))
    distances = span_distance(vectors.flatten(0, 1), basis).unflatten(0, vectors.shape[:2])
    return dict(zip(texts, distances.mean(1).tolist(), strict=True))


def without_used(words: Sequence[Sequence[int]], found: Iterable[Text]) -> list[list[int]]:
    """The candidates without the tokens of found texts, of which a position keeps its last one.

    Args:
        words: Token ids that may stand at each position.
        found: Texts, in their order.

    Example:
        >>> without_used([[101], [7, 8], [5, 7], [9]], [(101, 7, 5, 102), (101, 8, 7, 102)])
        [[101], [8], [7], [9]]
    """
    left = [list(tokens) for tokens in words]
    for text in found:
        for tokens, used in zip(left, text, strict=False):  # a text is shorter than the longest one may be
            if used in tokens and len(tokens) > 1:
                tokens.remove(used)
    return left


def _batches(texts: Iterator[Text], size: int) -> Iterator[list[Text]]:
    """Lists of as many texts as go through the network at once."""
    while batch := list(islice(texts, size)):
        yield batch


def textbook_encoder_attack(
    model: LanguageModel,
    update: Update,
    *,
    span_threshold_0: float = 1e-5,
    span_threshold_1: float = 1e-3,
    rank_tolerance: float | None = None,
    options: EncoderSearchOptions | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Recover the texts of a client's batch the way the paper describes, for encoders.

    As in `textbook.textbook_attack` the gradients of query, key and value are stacked. What this method does not
    see: how often a text occurs, texts made of two segments, and anything once a rank reaches the hidden size.
    Where block 1 is the model's last and the loss reads the first position alone, a text adds one direction by its
    query and two by the keys and values of each head: a text with more tokens than that fails the test.

    Args:
        model: The model both sides know, with at least two blocks.
        update: What the client sent.
        span_threshold_0: Relative distance from the span of block 0 below which a token passes (tau_1).
        span_threshold_1: Mean relative distance from the span of block 1 below which a text passes (tau_2).
        rank_tolerance: See `textbook.textbook_span`.
        options: What the search leaves out.
        progress: Called with the stage, how much is done and the total or None.

    Returns:
        The recovered sequences. Scores are distances in units of `span_threshold_1`, all below 1. The status is
        exact where the confirmed texts have as many tokens as the rank of block 1 tells.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: The model is causal, has one block only, its tokenizer does not put one token in front of a
            text and one behind, or its architecture has no adapter.

    See chapter 5.
    """
    times = [time.perf_counter()]
    adapter = adapter_for(model.network)
    if adapter.causal:
        raise DagerError(f"model {model.name!r} is causal: textbook_attack searches its texts")
    begin, end = _frame(model)
    spans = textbook_spans(model, adapter, update, rank_tolerance)
    times.append(time.perf_counter())
    hopeless = spans.verdict()
    candidates = [] if hopeless else textbook_token_filter(adapter, spans.bases[0], span_threshold_0, progress)
    times.append(time.perf_counter())
    search = textbook_encoder_search(
        adapter, spans.bases[1], candidates, begin, end, threshold=span_threshold_1, options=options, progress=progress
    )
    times.append(time.perf_counter())
    scores = {text: distance / span_threshold_1 for text, distance in search.confirmed.items()}
    return textbook_reconstruction(model, spans, scores, hopeless or _verdict(spans.ranks[1], search), times)


def _frame(model: LanguageModel) -> tuple[int, int]:
    """The token ids that begin and end every text of a model: what the tokenizer makes of no text."""
    frame = model.tokenizer("")["input_ids"]
    if len(frame) != 2:
        raise DagerError(
            f"the tokenizer of model {model.name!r} adds {len(frame)} tokens to a text: "
            "the textbook search of encoders needs one in front and one behind"
        )
    return frame[0], frame[1]


def _verdict(rank: int, search: EncoderSearch) -> tuple[str, str]:
    """Status and diagnosis, from the rank of block 1 and what was found."""
    if not search.possible:
        return "no_candidates", "no text from begin to end token lies in the span of block 0 at this threshold"
    seen = f"{search.tested} texts tested"
    if search.tested < search.possible:
        seen = f"{search.tested} of about 10^{math.log10(search.possible):.1f} texts tested"
    if not search.confirmed:
        return "no_candidates", f"no text lies in the span of block 1 at this threshold, {seen}"
    rows = sum(map(len, search.confirmed))
    status = "exact" if rows == rank else "partial"
    return status, f"texts of {rows} tokens confirmed, where the rank of block 1 tells {rank}; {seen}"
