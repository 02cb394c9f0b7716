"""The paper's attack on causal models, written the obvious, slow way (chapters 2 to 4).

Petrov et al., DAGER, NeurIPS 2024 (arXiv 2405.15586): Theorem 5.1 gives the span of a block's inputs, a
filter tests the vocabulary position by position against the span of the first block, and a search from left
to right tests whole prefixes against that of the second. Thresholds on distances are set by hand, and every
vector is computed anew whenever it is needed. The book shows this file, the tests take it as their oracle,
and `dager bench` measures against it. `textbook_encoder` builds the search of encoders on the same spans and filter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dager_tutorial.errors import DagerError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV, Tap
from dager_tutorial.models.adapter import Adapter, DecoderAdapter
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.budget import peak_memory_mb
from dager_tutorial.update import Update

Progress = Callable[[str, int, int | None], None]
Prefix = tuple[int, ...]

# Share of the largest singular value below which one counts as zero: a few float32 roundings.
RELATIVE_TOLERANCE = 5e-7
# How far a rotary model's first token is followed when it repeats; see `textbook_decoder_search`.
LONGEST_REPEAT = 8
# Tokens that go through the network at once.
TOKENS_AT_ONCE = 4096


def textbook_span(gradient: Tensor, rank_tolerance: float | None = None) -> Tensor:
    """An orthonormal basis of the row space of a gradient: the span of its layer's inputs (Theorem 5.1).

    Args:
        gradient: outputs x inputs; each row is a combination of the layer's input vectors.
        rank_tolerance: Singular values up to this one count as zero. None: 5e-7 of the largest. The paper's
            code wants an absolute tolerance, set by hand for each batch size between 1e-7 and 1e-9.

    Returns:
        float32, inputs x rank; no columns where the gradient is zero.

    Example:
        >>> textbook_span(torch.tensor([[3.0, 0.0, 4.0], [6.0, 0.0, 8.0]])).abs().round(decimals=3)
        tensor([[0.6000],
                [0.0000],
                [0.8000]])
    """
    _, singular_values, directions = torch.linalg.svd(gradient.double(), full_matrices=False)
    if rank_tolerance is None:
        rank_tolerance = RELATIVE_TOLERANCE * float(singular_values[0])
    rank = int((singular_values > rank_tolerance).sum())
    return directions[:rank].T.float()


def span_distance(vectors: Tensor, basis: Tensor) -> Tensor:
    """How far vectors lie from a span: the norm of what projection leaves, divided by the vector's norm.

    Args:
        vectors: float32, rows x inputs.
        basis: float32, inputs x rank, orthonormal columns.

    Returns:
        float32, rows, from 0 (in the span) to 1 (orthogonal to it); not a number for a zero vector.

    Example:
        >>> span_distance(torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([0.0000, 0.8000])
    """
    residual = vectors - (vectors @ basis) @ basis.T
    return residual.norm(dim=1) / vectors.norm(dim=1)


def is_full(basis: Tensor) -> bool:
    """Whether a span is so large that every vector lies in it.

    A layer norm without bias leaves its vectors no mean: they fill one dimension less than the width.

    Args:
        basis: float32, width x rank.
    """
    width, rank = basis.shape
    return rank >= width - 1


@torch.no_grad()
def textbook_token_filter(
    adapter: Adapter, basis: Tensor, threshold: float = 1e-5, progress: Progress | None = None
) -> list[Tensor]:
    """Test every token of the vocabulary, at one position after the other.

    Args:
        adapter: The architecture.
        basis: float32, width x rank, the span of block 0's attention inputs.
        threshold: Relative distance from the span below which a vector passes (the paper's tau_1).
        progress: Called with "filter", the number of positions done and None.

    Returns:
        int64 token ids for each position, nearest first, up to the first position without any. The vectors of a
        rotary model are the same at all positions: one test counts for all.
    """
    vocabulary = torch.arange(len(adapter.first_input.tokens), device=basis.device)
    candidates: list[Tensor] = []
    for position in range(adapter.max_positions):
        distances = span_distance(first_block_inputs(adapter, vocabulary, position), basis)
        nearest = distances.argsort()
        passing = nearest[distances[nearest] < threshold]
        if not len(passing):
            break
        candidates.append(passing)
        if progress:
            progress("filter", len(candidates), None)
        if is_rotary(adapter):
            return candidates * adapter.max_positions
    return candidates


@torch.no_grad()
def textbook_decoder_search(
    adapter: DecoderAdapter,
    basis: Tensor,
    candidates: Sequence[Tensor],
    threshold: float = 1e-3,
    progress: Progress | None = None,
) -> dict[Prefix, float]:
    """Extend every confirmed prefix by every candidate of the next position, until no extension is confirmed.

    With rotary positions a first token has the same state however often it is repeated ([A], [A, A], ...), so
    that all of these pass if one does. Here such a prefix is followed up to a length of 8.

    Args:
        adapter: The architecture.
        basis: float32, width x rank, the span of block 1's attention inputs.
        candidates: int64 token ids for each position, as `textbook_token_filter` returns them.
        threshold: Relative distance from the span below which a prefix passes (the paper's tau_2).
        progress: Called with "search", the number of confirmed prefixes and None.

    Returns:
        Every confirmed prefix, shorter ones first, with the largest distance on its way.
    """
    confirmed: dict[Prefix, float] = {}
    front: dict[Prefix, float] = {(): 0.0}
    for tokens in candidates:
        extended = [(*prefix, token) for prefix in front for token in tokens.tolist()]
        if is_rotary(adapter):
            extended = [prefix for prefix in extended if len(prefix) <= LONGEST_REPEAT or not is_repeat(prefix)]
        distances = prefix_distances(adapter, basis, extended)
        passing = {prefix: distance for prefix, distance in distances.items() if distance < threshold}
        front = {prefix: max(distance, front[prefix[:-1]]) for prefix, distance in passing.items()}
        if not front:
            break
        confirmed |= front
        if progress:
            progress("search", len(confirmed), None)
    return confirmed


def prefix_distances(adapter: DecoderAdapter, basis: Tensor, prefixes: Sequence[Prefix]) -> dict[Prefix, float]:
    """Run whole prefixes of one length; the distance of each one's last row from the span of block 1."""
    distances: list[float] = []
    at_once = TOKENS_AT_ONCE // len(prefixes[0]) + 1 if prefixes else 1
    for start in range(0, len(prefixes), at_once):
        token_ids = torch.tensor(prefixes[start : start + at_once], device=basis.device)
        vectors = second_block_inputs(adapter, token_ids)
        distances += span_distance(vectors[:, -1], basis).tolist()
    return dict(zip(prefixes, distances, strict=True))


def first_block_inputs(adapter: Adapter, tokens: Tensor, position: int) -> Tensor:
    """What enters the query, key and value maps of block 0, where nothing has been mixed yet.

    Args:
        adapter: The architecture.
        tokens: int64 token ids, each put at the position by itself.
        position: The position, from 0.

    Returns:
        float32, tokens x width.
    """
    return _run_to_block(adapter, 0, tokens[:, None], position)[:, 0]


def second_block_inputs(adapter: Adapter, token_ids: Tensor) -> Tensor:
    """What enters the query, key and value maps of block 1.

    Args:
        adapter: The architecture.
        token_ids: int64, batch x length, without pads.

    Returns:
        float32, batch x length x width.
    """
    return _run_to_block(adapter, 1, token_ids)


class _Reached(Exception):
    """The way out of a forward pass: carries the vectors that enter a block's attention."""


def _run_to_block(adapter: Adapter, block: int, token_ids: Tensor, start: int = 0) -> Tensor:
    """Run the unmodified network up to the query, key and value maps of a block, and no further.

    The texts (int64, batch x length) begin at the position `start`.
    """

    def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    positions = adapter.position_ids(torch.ones_like(token_ids[:1])) + start
    handle = adapter.linear_maps(block, QKV)[0].register_forward_pre_hook(stop)
    try:
        adapter.network(input_ids=token_ids, position_ids=positions, use_cache=False)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"a forward pass went by block {block}")


def is_rotary(adapter: Adapter) -> bool:
    """Whether block 0's attention input is the same at all positions."""
    return adapter.first_input.positions is None


def is_repeat(prefix: Prefix) -> bool:
    """Whether a prefix is one token, repeated.

    >>> is_repeat((7,)), is_repeat((7, 7)), is_repeat((7, 7, 8))
    (False, True, False)
    """
    return len(prefix) > 1 and len(set(prefix)) == 1


def longest_prefixes(prefixes: Iterable[Prefix]) -> list[Prefix]:
    """The prefixes that begin no other one: the texts.

    >>> longest_prefixes([(1,), (3,), (1, 1), (1, 2), (1, 2, 4)])
    [(3,), (1, 1), (1, 2, 4)]
    """
    prefixes = list(prefixes)
    beginnings = {prefix[:length] for prefix in prefixes for length in range(len(prefix))}
    return [prefix for prefix in prefixes if prefix not in beginnings]


@dataclass(frozen=True)
class TextbookSpans:
    """What the gradients of blocks 0 and 1 tell: the spans of what enters their attention.

    Attributes:
        names: The names of the two taps.
        bases: float32, width x rank, for each of them.
        parameters_used: Number of gradient entries that were read.
    """

    names: tuple[str, str]
    bases: tuple[Tensor, Tensor]
    parameters_used: int

    @property
    def ranks(self) -> list[int]:
        """The ranks of blocks 0 and 1."""
        return [basis.shape[1] for basis in self.bases]

    def verdict(self) -> tuple[str, str] | None:
        """Status and diagnosis where no search can answer, else None."""
        if 0 in self.ranks:
            return "no_signal", f"block {self.ranks.index(0)}'s query, key and value gradients are missing or zero"
        if any(is_full(basis) for basis in self.bases):
            return "saturated", f"ranks {self.ranks[0]} and {self.ranks[1]} leave no vector outside a span"
        return None


def textbook_spans(
    model: LanguageModel, adapter: Adapter, update: Update, rank_tolerance: float | None = None
) -> TextbookSpans:
    """The spans of blocks 0 and 1, from the stacked gradients of query, key and value.

    Args:
        model: The model both sides know.
        adapter: Its architecture.
        update: What the client sent.
        rank_tolerance: See `textbook_span`.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: The model has one block only.
    """
    if adapter.num_blocks < 2:
        raise DagerError(f"model {model.name!r} has one block: the textbook attack needs two, load more of it")
    gradients = {name: tensor.to(model.device) for name, tensor in update.for_backbone(model.network).items()}
    taps = [adapter.tap(block, QKV) for block in (0, 1)]
    bases = [textbook_span(_gradient(tap, gradients, adapter.hidden_size), rank_tolerance) for tap in taps]
    return TextbookSpans(
        names=(taps[0].name, taps[1].name),
        bases=(bases[0].to(model.device), bases[1].to(model.device)),
        parameters_used=sum(gradients[name].numel() for tap in taps for name in tap.parameters if name in gradients),
    )


def _gradient(tap: Tap, gradients: Mapping[str, Tensor], width: int) -> Tensor:
    """The stacked gradient of a tap, a row of zeros where nothing of it was shared."""
    gradient = tap.gradient(gradients)
    return torch.zeros(1, width) if gradient is None else gradient


def textbook_attack(
    model: LanguageModel,
    update: Update,
    *,
    span_threshold_0: float = 1e-5,
    span_threshold_1: float = 1e-3,
    rank_tolerance: float | None = None,
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
        progress: Called with the stage, how much is done and None.

    Returns:
        The recovered sequences. Scores are distances in units of `span_threshold_1`, all below 1. The status
        is exact where as many prefixes are confirmed as the rank of block 1 tells.

    Raises:
        UpdateError: The update does not belong to the model.
        DagerError: The model is an encoder (see `textbook_encoder`), has one block only, or its architecture has
            no adapter.

    See chapters 2 to 4.
    """
    times = [time.perf_counter()]
    adapter = adapter_for(model.network)
    if not isinstance(adapter, DecoderAdapter):
        raise DagerError(f"model {model.name!r} is an encoder: textbook_encoder_attack searches its texts")
    spans = textbook_spans(model, adapter, update, rank_tolerance)
    times.append(time.perf_counter())
    hopeless = spans.verdict()
    candidates = [] if hopeless else textbook_token_filter(adapter, spans.bases[0], span_threshold_0, progress)
    times.append(time.perf_counter())
    confirmed = textbook_decoder_search(adapter, spans.bases[1], candidates, span_threshold_1, progress)
    rows = [prefix for prefix in confirmed if not (is_rotary(adapter) and is_repeat(prefix))]
    scores = {text: confirmed[text] / span_threshold_1 for text in longest_prefixes(rows)}
    times.append(time.perf_counter())
    return textbook_reconstruction(model, spans, scores, hopeless or _verdict(spans.ranks[1], len(rows)), times)


def _verdict(rank: int, rows: int) -> tuple[str, str]:
    """Status and diagnosis, from the rank of block 1 and the number of confirmed prefixes."""
    if rows == 0:
        return "no_candidates", "no first token lies in both spans at these thresholds"
    status = "exact" if rows == rank else "partial"
    return status, f"{rows} prefixes confirmed, where the rank of block 1 tells {rank}"


def textbook_reconstruction(
    model: LanguageModel,
    spans: TextbookSpans,
    scores: Mapping[Prefix, float],
    verdict: tuple[str, str],
    times: Sequence[float],
) -> Reconstruction:
    """Put the answer together.

    Args:
        model: The model both sides know.
        spans: The spans that the search used.
        scores: The recovered sequences, each with its score.
        verdict: Status and diagnosis.
        times: Seconds of a clock, at the start and after each of the three stages.
    """
    status, diagnosis = verdict
    durations = [end - start for start, end in pairwise(times)]
    return Reconstruction(
        sequences=tuple(scores),
        texts=tuple(map(model.text_of, scores)),
        scores=tuple(scores.values()),
        status=status,
        diagnosis=diagnosis,
        seconds=dict(zip(("subspace", "filter", "search"), durations, strict=True)) | {"total": sum(durations)},
        ranks=dict(zip(spans.names, spans.ranks, strict=True)),
        model=model.name,
        n_parameters_used=spans.parameters_used,
        peak_rss_mb=peak_memory_mb(),
    )
