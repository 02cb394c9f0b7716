"""What can be read off an update before any search: ranks, spectra, rounding, and what embeddings name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, KINDS, QKV, Tap
from dager_tutorial.server.drift import unmoved
from dager_tutorial.server.embedding_rows import named_positions, named_tokens
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.server.rank import noise_edge
from dager_tutorial.server.subspace import Span
from dager_tutorial.update import Update

WHOLE_WIDTH = 1600
"""Of a wider map only the signal's singular values are shown: all of them would take minutes."""
SHOWN_BLOCKS = 12
"""Of a deeper model some blocks are read, at about even distances: noise makes every map take seconds."""
SHOWN_POINTS = 240
"""Singular values that a picture of a spectrum has, at most about."""


@dataclass(frozen=True)
class MapReading:
    """The rank of one map's gradient.

    Attributes:
        name: Block and kind of the map.
        block: Its block.
        kind: One of `tap.KINDS`.
        width: Numbers in one of its inputs.
        rank: How many independent inputs it shows.
        noise: Root mean square of a noise entry over that of a gradient entry.
        clear: Whether a gap stands below the signal, so that the rank is no guess.
        saturated: Whether the signal fills all directions.
    """

    name: str
    block: int
    kind: str
    width: int
    rank: int
    noise: float
    clear: bool
    saturated: bool


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one map's gradient, over the largest of them.

    Attributes:
        name: Block and kind of the map.
        rank: How many are signal.
        width: How many there are.
        edge: The largest that noise explains.
        points: Place (from 1) and value; of a long flat end only some.
    """

    name: str
    rank: int
    width: int
    edge: float
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Named:
    """What embedding rows name.

    Attributes:
        tokens: How many tokens of the vocabulary.
        positions: How many positions the longest text has; None where nothing tells.
        words: The tokens as text; None where texts are hidden.
    """

    tokens: int | None
    positions: int | None
    words: tuple[str, ...] | None


@dataclass(frozen=True)
class Readings:
    """What was read.

    Attributes:
        precision: The type that the numbers show, whatever they are stored in.
        unmoved: Share of a weight difference's entries that did not move; None for a gradient.
        named: What embedding rows name.
        maps: One reading a map, of some blocks where there are many.
        spectra: Of a few maps.
    """

    precision: str
    unmoved: float | None
    named: Named
    maps: tuple[MapReading, ...]
    spectra: tuple[Spectrum, ...]


def readings_of(model: LanguageModel, update: Update, *, show_texts: bool = False) -> Readings:
    """Read an update.

    Args:
        model: The model both sides know.
        update: What the client sent.
        show_texts: Whether words may be named.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.
    """
    evidence = evidence_of(model, update)
    blocks, shown = _blocks(evidence.adapter.num_blocks), _shown(evidence)
    maps, spectra = [], []
    for tap in evidence.adapter.taps():
        span = evidence.span(tap) if tap.block in blocks else None
        if span is None:
            continue
        maps.append(_map(tap, span))
        if tap in shown:
            spectra.append(_spectrum(tap.name, span))
        evidence.spans[tap] = replace(span, matrix=None, known=None)  # what is large and was read
    return Readings(
        precision=str(evidence.precision).removeprefix("torch."),
        unmoved=unmoved(evidence.gradients, evidence.used) if update.kind == "delta" else None,
        named=_named(model, evidence, show_texts),
        maps=tuple(maps),
        spectra=tuple(spectra),
    )


def _blocks(count: int) -> set[int]:
    """The blocks that are read: the first two, the last two, and some between.

    >>> sorted(_blocks(30))
    [0, 1, 3, 6, 8, 11, 14, 17, 20, 22, 25, 28, 29]
    """
    if count <= SHOWN_BLOCKS:
        return set(range(count))
    between = {round(place * (count - 2) / (SHOWN_BLOCKS - 2)) for place in range(SHOWN_BLOCKS - 1)}
    return {0, 1, count - 1} | between


def _named(model: LanguageModel, evidence: Evidence, show_texts: bool) -> Named:
    tokens, positions = named_tokens(evidence), named_positions(evidence)
    words = None
    if tokens is not None and show_texts:
        words = tuple(str(model.tokenizer.decode([token])) for token in tokens.tolist())
    return Named(None if tokens is None else len(tokens), positions, words)


def _map(tap: Tap, span: Span) -> MapReading:
    return MapReading(
        tap.name, tap.block, tap.kind, span.width, span.rank, span.noise_floor, span.clear, span.saturated
    )


def _shown(evidence: Evidence) -> set[Tap]:
    """The maps that say most: block 0 (tokens), block 1 (rows) and the last block (where texts end)."""
    adapter, last = evidence.adapter, evidence.adapter.num_blocks - 1
    ends = [adapter.tap(last, kind) for kind in (ATTENTION_OUTPUT, *KINDS)]
    choices = [[adapter.tap(0, QKV)], [adapter.tap(min(1, last), kind) for kind in KINDS], ends]
    found = (next((tap for tap in choice if evidence.shared(tap)), None) for choice in choices)
    return {tap for tap in found if tap is not None}


def _spectrum(name: str, span: Span) -> Spectrum:
    whole = span.known is not None or span.width <= WHOLE_WIDTH
    values = span.singular_values if whole else span.strengths
    largest = values[0].item() if len(values) else 0.0
    edge = noise_edge(span.tail.energy, span.outputs - span.rank, span.width - span.rank, 0.0)
    scale = 1 / largest if largest > 0 else 0.0
    return Spectrum(name, span.rank, span.width, edge * scale, _points(values * scale, span.rank))


def _points(values: Tensor, rank: int) -> tuple[tuple[int, float], ...]:
    """Places and values: all around the rank, of the rest some."""
    step = max(1, math.ceil(len(values) / SHOWN_POINTS))
    places = [place for place in range(len(values)) if place % step == 0 or abs(place - rank) <= 3]
    return tuple((place + 1, float(f"{values[place].item():.3g}")) for place in places)


def most_rows(maps: Sequence[MapReading]) -> int | None:
    """How many different rows the texts have, where a rank with a clear gap tells; the last block shows only ends.

    Args:
        maps: The readings.
    """
    last = max((each.block for each in maps), default=0)
    inner = (each for each in maps if each.block < last)
    return max((each.rank for each in inner if each.clear and not each.saturated), default=None)
