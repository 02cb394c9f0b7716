"""A look at an update before any attack: rank, noise and verdict of every tap (chapter `10_whole_attack`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.drift import evenness
from dager_tutorial.server.embedding_rows import named_tokens
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.server.verdict import of_signs, unreadable
from dager_tutorial.update import Update


class TapReport(NamedTuple):
    """One tap of an update, as `dager inspect` shows it.

    Attributes:
        tap: The tap.
        shape: (outputs, inputs) of its stacked gradient; of an adapter's (outputs, r) where the inputs are projected.
        rank: Numerical rank.
        noise_floor: Relative noise: root mean square of a noise entry over that of a gradient entry.
        gap: Ratio of the last signal to the first noise singular value.
        saturated: True where no residual is left to test.
    """

    tap: Tap
    shape: tuple[int, int]
    rank: int
    noise_floor: float
    gap: float
    saturated: bool

    def to_json(self) -> dict[str, Any]:
        """The row as JSON types only, the tap by its name; a gap that is not finite becomes null."""
        gap = self.gap if math.isfinite(self.gap) else None
        record = self._asdict() | {"name": self.tap.name, "shape": list(self.shape), "gap": gap}
        return {key: record[key] for key in ("name", "shape", "rank", "noise_floor", "gap", "saturated")}


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
        """The record as JSON types only."""
        return {"rows": [row.to_json() for row in self.rows], "verdict": self.verdict}


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
    reports = (_report(evidence, tap) for tap in evidence.adapter.taps())
    rows = tuple(report for report in reports if report is not None)
    said = signs(evidence) if update.kind == "delta" else None
    return Inspection(rows, said or _elsewhere(evidence, rows) or prospects(evidence))


def _elsewhere(evidence: Evidence, rows: tuple[TapReport, ...]) -> str | None:
    """What is to be said where block 0 names no token and the embedding rows do: a causal search begins there."""
    nothing = unreadable(evidence)
    if nothing is None or not isinstance(evidence.adapter, DecoderAdapter):
        return None
    named = named_tokens(evidence) if any(row.rank and not row.saturated for row in rows) else None
    if named is None:
        return None
    return f"{nothing.diagnosis}; but the embedding rows name {len(named)} tokens, and the search can begin with them"


def signs(evidence: Evidence) -> str | None:
    """What is to be said of a weight difference that holds little but signs; None of another one.

    Args:
        evidence: The difference, of which something was read.
    """
    if evenness(evidence.gradients, evidence.used) < constants().even_sizes:
        return None
    named = named_tokens(evidence)
    return of_signs(None if named is None else len(named))


def _report(evidence: Evidence, tap: Tap) -> TapReport | None:
    """One tap's row, or None where nothing of it was shared."""
    gradient, span = tap.gradient(evidence.gradients), evidence.span(tap)
    if not evidence.shared(tap):
        return None
    if span is None:
        shape = (0, 0) if gradient is None else (gradient.shape[0], gradient.shape[1])
        return TapReport(tap, shape, 0, 0.0, 1.0, saturated=False)
    shape = (span.outputs, span.width) if gradient is None else (gradient.shape[0], gradient.shape[1])
    return TapReport(tap, shape, span.rank, span.noise_floor, span.gap, span.saturated)


def prospects(evidence: Evidence) -> str:
    """What is to be expected of an attack, before any search: one sentence for people."""
    nothing = unreadable(evidence)
    if nothing is not None:
        return nothing.diagnosis
    adapter = evidence.adapter
    first = evidence.present(adapter.tap(0, QKV)).popitem()[1]
    if first.saturated:
        return "block 0 is saturated: even single tokens hide in the full rank"
    later = [tap for tap in adapter.taps() if (tap.block, tap.kind) != (0, QKV)]
    deeper = [span for span in evidence.present(*later).values() if span.rank]
    full = any(span.saturated for span in deeper)
    if isinstance(adapter, DecoderAdapter):
        return _of_a_decoder(first.rank, bool(deeper), full)
    return _of_an_encoder(first.rank, evidence.span(adapter.tap(0, ATTENTION_OUTPUT)) is not None, full)


def _of_a_decoder(inputs: int, deeper: bool, full: bool) -> str:
    """What is to be expected where block 0 tells the tokens of a causal model."""
    if full:
        return "tokens can be told from block 0, prefixes only by leverage: they are about as many as the model is wide"
    if not deeper:
        return "tokens can be told from block 0; without further taps their order cannot"
    return f"exposed: {inputs} independent inputs in block 0 and room in the span to test every prefix"


def _of_an_encoder(inputs: int, attended: bool, full: bool) -> str:
    """What is to be expected where block 0 tells the tokens of a bidirectional model."""
    if not attended:
        return "tokens can be told from block 0; without its attention output gradient whole texts cannot"
    if full:
        return "tokens can be told from block 0, whole texts cannot: they have about as many as the model is wide"
    return f"exposed: {inputs} independent inputs in block 0 and room in the span to test whole texts"
