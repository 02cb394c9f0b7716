"""What an update says, tap by tap: the spans of its gradients, and a report of them for people."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV, Tap
from dager_tutorial.models.adapter import Adapter, DecoderAdapter
from dager_tutorial.server.rounding import rounding_errors
from dager_tutorial.server.subspace import Span, span_of
from dager_tutorial.update import Update


@dataclass
class Evidence:
    """The spans of an update, read when they are first asked for."""

    adapter: Adapter
    gradients: Mapping[str, Tensor]
    precision: torch.dtype
    seconds: float = 0.0
    used: set[str] = field(default_factory=set)
    spans: dict[Tap, Span | None] = field(default_factory=dict)
    errors: dict[Tap, float] = field(default_factory=dict)

    def span(self, block: int, kind: str) -> Span | None:
        """The span of a tap, or None where nothing of it was shared or its gradient is zero."""
        tap = self.adapter.tap(block, kind)
        if tap not in self.spans:
            start = time.perf_counter()
            self.spans[tap] = self._read(tap)
            self.seconds += time.perf_counter() - start
        return self.spans[tap]

    def _read(self, tap: Tap) -> Span | None:
        gradient = tap.gradient(self.gradients)
        if gradient is None:
            return None
        self.used.update(name for name in tap.parameters if name in self.gradients)
        return span_of(
            gradient,
            name=tap.name,
            precision=torch.finfo(self.precision).eps,
            arithmetic=self._arithmetic(tap),
        )

    def _arithmetic(self, tap: Tap) -> float:
        """Rounding error of the tap's inputs: measured in two blocks, then growing with the root of the depth."""
        if not isinstance(self.adapter, DecoderAdapter):
            return torch.finfo(self.precision).eps
        if not self.errors:
            self.errors = rounding_errors(self.adapter, self.precision, min(2, self.adapter.num_blocks))
        if tap in self.errors:
            return self.errors[tap]
        return max(self.errors.values()) * math.sqrt(tap.block)

    @property
    def parameters_used(self) -> int:
        """Number of gradient entries read so far."""
        return sum(self.gradients[name].numel() for name in self.used)


def evidence_of(model: LanguageModel, update: Update) -> Evidence:
    """Match an update with a model.

    Args:
        model: The model both sides know.
        update: What the client sent.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.
    """
    adapter = adapter_for(model.network)
    gradients = {name: tensor.to(model.device) for name, tensor in update.for_backbone(model.network).items()}
    coarsest = max((tensor.dtype for tensor in gradients.values()), key=lambda dtype: torch.finfo(dtype).eps)
    return Evidence(adapter, gradients, coarsest)


class TapReport(NamedTuple):
    """One tap of an update, as `dager inspect` shows it.

    Attributes:
        name: The tap.
        shape: (outputs, inputs) of its stacked gradient.
        rank: Numerical rank.
        noise_floor: Relative noise: root mean square of a noise entry over that of a gradient entry.
        gap: Ratio of the last signal to the first noise singular value.
        saturated: True where no residual is left to test.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    noise_floor: float
    gap: float
    saturated: bool


@dataclass(frozen=True)
class Inspection:
    """What an update gives away, before any search.

    Attributes:
        rows: One report for each tap that was shared.
        verdict: One sentence for people.
    """

    rows: tuple[TapReport, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types only; a gap that is not finite becomes null."""
        record = asdict(self)
        record["rows"] = [
            {**row._asdict(), "shape": list(row.shape), "gap": row.gap if math.isfinite(row.gap) else None}
            for row in self.rows
        ]
        return record


def inspect_update(model: LanguageModel, update: Update) -> Inspection:
    """Read rank, noise and verdict off every tap of an update.

    Args:
        model: The model both sides know.
        update: What the client sent.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.
    """
    evidence = evidence_of(model, update)
    rows = []
    for tap in evidence.adapter.taps():
        gradient = tap.gradient(evidence.gradients)
        if gradient is None:
            continue
        span = evidence.span(tap.block, tap.kind)
        shape = (gradient.shape[0], gradient.shape[1])
        if span is None:
            rows.append(TapReport(tap.name, shape, 0, 0.0, 1.0, saturated=False))
        else:
            rows.append(TapReport(tap.name, shape, span.rank, span.noise_floor, span.gap, span.saturated))
    return Inspection(tuple(rows), _verdict(evidence, rows))


def _verdict(evidence: Evidence, rows: list[TapReport]) -> str:
    first = evidence.span(0, QKV)
    if first is None or first.rank == 0:
        return "block 0's query, key and value gradients are missing or zero: span attacks have nothing to work with"
    if first.saturated:
        return "block 0 is saturated: even single tokens hide in the full rank"
    deeper = [row for row in rows if not row.name.startswith("block 0 query") and row.rank]
    if evidence.adapter.causal:
        return _decoder_verdict(first, deeper)
    return _encoder_verdict(first, evidence.span(0, ATTENTION_OUTPUT), deeper)


def _decoder_verdict(first: Span, deeper: list[TapReport]) -> str:
    """What is to be expected where block 0 tells the tokens of a causal model."""
    if any(row.saturated for row in deeper):
        return "tokens can be told from block 0, prefixes only by leverage: they are about as many as the model is wide"
    if not deeper:
        return "tokens can be told from block 0; without further taps their order cannot"
    return f"exposed: {first.rank} independent inputs in block 0 and room in the span to test every prefix"


def _encoder_verdict(first: Span, attended: Span | None, deeper: list[TapReport]) -> str:
    """What is to be expected where block 0 tells the tokens of a bidirectional model."""
    if attended is None:
        return "tokens can be told from block 0; without its attention output gradient whole texts cannot"
    if any(row.saturated for row in deeper):
        return "tokens can be told from block 0, whole texts cannot: they have about as many as the model is wide"
    return f"exposed: {first.rank} independent inputs in block 0 and room in the span to test whole texts"
