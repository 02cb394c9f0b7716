"""What an update says, tap by tap: the spans of its gradients, read when they are first asked for.

Chapter `03_span`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.low_rank import LowRankMaps
from dager_tutorial.models.tap import MLP, QKV, QUERY, Tap, precise
from dager_tutorial.server.adapter_reading import adapter_gradients, adapter_names, low_rank_span, stacked_downs
from dager_tutorial.server.constants import constants
from dager_tutorial.server.drift import halfway, undecayed
from dager_tutorial.server.missing.entries import sent_as
from dager_tutorial.server.missing.filling import Filled, filled, filled_span
from dager_tutorial.server.missing.quantised import grid_span, in_steps
from dager_tutorial.server.odds import Usual, leverage_log_odds, usual
from dager_tutorial.server.reading import span_of
from dager_tutorial.server.rounding import probe, rounding_errors
from dager_tutorial.server.subspace import Span
from dager_tutorial.status import Status
from dager_tutorial.stopwatch import Stopwatch
from dager_tutorial.update import Update


@dataclass
class Evidence:
    """The gradients of an update and, by tap, what was read off them so far.

    Attributes:
        adapter: The architecture.
        gradients: Gradients by backbone parameter name.
        precision: The coarsest dtype among them, and that block 0's numbers show, whatever they are stored in.
        maps: The low-rank adapter that the update is of, by module; empty for gradients of the weights themselves.
        watch: Credits the time that reading takes to the stage `subspace`.
        spans: What was read, None where nothing was shared or all is zero.
        rounding: How many times larger the errors of the gradients are than those of storing them, at least.
        drifts: How far the client's steps moved the inputs of taps, relative; empty for a gradient.
        tokenizer: The model's, which knows tokens that no text can have; None where it is not known.
        is_remainder: Whether known texts were taken off the gradients.
        pruned: Whether a client sent some of the entries only, and zeros for the others.
        bits: With how many bits it sent an entry, where it rounded them to a grid.
    """

    adapter: Adapter
    gradients: Mapping[str, Tensor]
    precision: torch.dtype
    watch: Stopwatch = field(default_factory=Stopwatch)
    maps: LowRankMaps = field(default_factory=dict)
    spans: dict[Tap, Span | None] = field(default_factory=dict)
    rounding: float = 1.0
    drifts: Mapping[Tap, float] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    is_remainder: bool = False
    pruned: bool = False
    bits: int | None = None
    _errors: dict[Tap, float] = field(default_factory=dict)
    _usual: dict[Tap, Usual] = field(default_factory=dict)
    _filled: dict[Tap, Filled | None] = field(default_factory=dict)

    def span(self, tap: Tap) -> Span | None:
        """The span of a tap, or None where nothing of it was shared or its gradient is zero."""
        if tap not in self.spans:
            with self.watch.stage("subspace"):
                self.spans[tap] = self._read(tap)
        return self.spans[tap]

    def _read(self, tap: Tap) -> Span | None:
        gradient = tap.gradient(self.gradients)
        if gradient is None and not self.maps:
            return None
        epsilon = math.hypot(torch.finfo(self.precision).eps * self.rounding, self._drift(tap))
        device = self.adapter.first_input.tokens.device
        arithmetic, guess = self.arithmetic(tap), self._guess(tap)
        read = partial(span_of, precision=epsilon, arithmetic=arithmetic, device=device, guess=guess)
        if gradient is None:
            return low_rank_span(tap, self.gradients, self.maps, read)
        if self.pruned:
            return filled_span(self.filled(tap), gradient.shape[1], read)
        if self.bits is not None:
            levels = {name: in_steps(self.gradients[name], self.bits) for name in self.shared(tap)}
            stacked = tap.gradient(levels)
            return None if stacked is None else grid_span(stacked, arithmetic=arithmetic, device=device)
        return read(gradient, shared=self._bias(tap))

    def filled(self, tap: Tap) -> Filled | None:
        """The gradient of a tap, as far as what was sent of it tells the rest; None where too little was."""
        if tap not in self._filled:
            gradient = tap.gradient(self.gradients)
            self._filled[tap] = None if gradient is None else filled(gradient, self._guess(tap))
        return self._filled[tap]

    def of_downs(self, tap: Tap) -> Float[Tensor, "outputs inputs"] | None:
        """The gradients (float64) of an adapter's A at a tap, stacked; None where nothing of them was shared."""
        return stacked_downs(tap, self.gradients, self.maps)

    def _bias(self, tap: Tap) -> Tensor | None:
        """What every input of block 0's attention has in common, over its length; None elsewhere, and where nothing."""
        source = self.adapter.first_input
        if source.bias is None or tap.block or tap.kind not in (QKV, QUERY) or not bool(source.bias.any()):
            return None
        return source.bias / source.gain.norm()

    def _guess(self, tap: Tap) -> int:
        """About how many rows a tap has: as many as others before it, but for the last block's, which has few."""
        if tap.block == self.adapter.num_blocks - 1:
            return 0
        return max((span.rank for span in self.spans.values() if span is not None), default=0)

    def present(self, *taps: Tap) -> dict[Tap, Span]:
        """The spans of those taps that have one, in their order."""
        spans = {tap: self.span(tap) for tap in taps}
        return {tap: span for tap, span in spans.items() if span is not None}

    def arithmetic(self, tap: Tap) -> float:
        """Relative error of a tap's inputs: by rounding, and by the client's steps."""
        return math.hypot(self._rounding(tap), self._drift(tap))

    def _drift(self, tap: Tap) -> float:
        """Relative error that the client's steps make of a tap's inputs."""
        return constants().drift_share * self.drifts.get(self._entering(tap), 0.0)

    def _entering(self, tap: Tap) -> Tap:
        """The tap that stands for what enters this one: what enters the query map enters all."""
        return self.adapter.tap(tap.block, QKV) if tap.kind == QUERY else tap

    def _rounding(self, tap: Tap) -> float:
        """Measured in early blocks, then growing as the root of depth."""
        if not self._errors:
            blocks = min(constants().probe_blocks, self.adapter.num_blocks)
            self._errors.update(rounding_errors(self.adapter, self.precision, blocks))
        inputs = self._entering(tap)
        if inputs in self._errors:
            return self._errors[inputs]
        return max(self._errors.values()) * math.sqrt(max(tap.block, 1))

    def nothing_in(self, tap: Tap) -> Status | None:
        """Why a tap says nothing (`NO_SIGNAL` or `NOISE`); None where it does say something."""
        span = self.span(tap)
        if span is None:
            return Status.NO_SIGNAL
        return Status.NOISE if span.rank == 0 else None

    def log_odds(self, vectors: Mapping[Tap, Float[Tensor, "rows _"]]) -> dict[Tap, Float[Tensor, " rows"]]:
        """Log-odds that vectors were rows of the batch against that they were not, tap by tap.

        From the residual where there is one, from the leverage where the rank is full. Callers sum over taps and
        blocks; the hard test `Span.holds` is the case of one tap and its `least_log_odds`.

        Args:
            vectors: For each tap the vectors to weigh, float32; of a candidate those that enter the taps at its place.

        Returns:
            float64; taps of which nothing was shared, or nothing but noise, say nothing and are left out.
        """
        speaking = [tap for tap in vectors if self.nothing_in(tap) is None]
        return {tap: self._log_odds(tap, vectors[tap]) for tap in speaking}

    def _log_odds(self, tap: Tap, vectors: Tensor) -> Tensor:
        span = self.spans[tap]
        assert span is not None
        if not span.saturated:
            return span.log_odds(vectors)
        return leverage_log_odds(span.log_leverage(vectors), self.usual(tap))

    def usual(self, tap: Tap) -> Usual:
        """What log-leverages rows have at a tap that are in no batch: those of random texts."""
        if tap not in self._usual:
            ids = probe(self.adapter, constants().null_texts, constants().null_length, seed=1)
            span, inputs = self.span(tap), self.adapter.tap_inputs(ids, torch.ones_like(ids), [tap])
            assert span is not None, f"{tap.name} was not shared"
            self._usual[tap] = usual(span.log_leverage(inputs[tap].flatten(0, 1)))
        return self._usual[tap]

    def less(self, gradients: Mapping[str, Tensor]) -> Evidence:
        """The evidence of the same update after known texts were taken off it.

        Args:
            gradients: What is left, by backbone parameter name.
        """
        rest = {name: tensor.to(self.adapter.first_input.tokens.device) for name, tensor in gradients.items()}
        # What is left keeps the rounding of all that was added up, twice: the client's and that of the simulation.
        rounding = constants().largest_rounding
        return Evidence(
            self.adapter,
            rest,
            self.precision,
            self.watch,
            self.maps,
            rounding=rounding,
            drifts=self.drifts,
            tokenizer=self.tokenizer,
            is_remainder=True,
            pruned=self.pruned,
            bits=self.bits,
            _errors=self._errors,
        )

    def shared(self, tap: Tap) -> set[str]:
        """Those weights of a tap of which something was shared: their own gradient, or that of their adapter."""
        return {each for each in tap.parameters if {each, *adapter_names(each)} & self.gradients.keys()}

    @property
    def used(self) -> set[str]:
        """Names of the parameters whose gradients were read so far."""
        read = (tap for tap, span in self.spans.items() if span is not None)
        names = {name for tap in read for weight in tap.parameters for name in (weight, *adapter_names(weight))}
        return names & self.gradients.keys()

    @property
    def parameters_used(self) -> int:
        """Number of gradient entries read so far."""
        return sum(self.gradients[name].numel() for name in self.used)


def evidence_of(model: LanguageModel, update: Update, watch: Stopwatch | None = None) -> Evidence:
    """Match an update with a model.

    Args:
        model: The model both sides know.
        update: What the client sent.
        watch: Takes the time that reading takes; None for a new one.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.
    """
    adapter = adapter_for(model.network)
    adapted = adapter_gradients(update, model)
    own = adapted or update.for_backbone(model.network)
    gradients = {name: tensor.to(model.device) for name, tensor in own.items()}
    kinds = [tensor.dtype for tensor in gradients.values()]
    if update.kind == "delta":
        gradients |= _without_decay(adapter, gradients)
    weights = adapter.tap(0, QKV).parameters
    first = [gradients[name] for each in weights for name in (each, *adapter_names(each)) if name in gradients]
    if first:
        kinds.append(_narrowest(torch.cat([precise(each).flatten() for each in first])))
    coarsest = max(kinds, key=lambda dtype: torch.finfo(dtype).eps)
    maps = model.adapter if adapted else {}
    whole = update.kind == "gradient" and not maps
    bits, pruned = sent_as(adapter, gradients, coarsest) if whole else (None, False)
    evidence = Evidence(
        adapter,
        gradients,
        coarsest,
        watch or Stopwatch(),
        maps,
        tokenizer=model.tokenizer,
        pruned=pruned,
        bits=bits,
    )
    if update.kind != "delta" or adapted or _of_one_step(evidence):
        return evidence
    between, drifts = halfway(adapter, gradients)
    return Evidence(between, gradients, coarsest, evidence.watch, drifts=drifts, tokenizer=model.tokenizer)


def _without_decay(adapter: Adapter, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The differences of the embeddings' tables, without weight decay."""
    source, own = adapter.first_input, dict(adapter.network.named_parameters())
    names = [name for name, each in own.items() if each is source.tokens or each is source.positions]
    return {name: undecayed(own[name].detach(), delta[name]) for name in names if name in delta}


def _of_one_step(evidence: Evidence) -> bool:
    """Whether a weight difference is a gradient: inputs that steps had moved would leave no gap in a later tap."""
    adapter = evidence.adapter
    span = evidence.span(adapter.tap(1, QKV) if adapter.num_blocks > 1 else adapter.tap(0, MLP))
    return span is not None and span.clear


def _narrowest(gradient: Tensor) -> torch.dtype:
    """The narrowest type that holds all numbers: what was computed in bfloat16 may travel as float32."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return next((dtype for dtype in narrow if torch.equal(gradient.to(dtype).to(gradient), gradient)), gradient.dtype)
