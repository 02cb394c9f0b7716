"""From a gradient to the span of its layer's inputs: outputs scaled to equal noise, then taken apart.

Chapter `04_noise`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.server.constants import constants
from dager_tutorial.server.decomposition import Signal, signal_of
from dager_tutorial.server.subspace import Span


def span_of(
    gradient: Float[Tensor, "outputs inputs"],
    *,
    precision: float = 2.0**-23,
    arithmetic: float = 0.0,
    device: torch.device | None = None,
    guess: int = 0,
    shared: Float[Tensor, " inputs"] | None = None,
    uneven: bool = False,
) -> Span | None:
    """Read the span of a layer's inputs off its gradient.

    The gradient's outputs are first scaled to equal noise: rounding noise is proportional to an output's gradient;
    noise that was added is not, and shows in what is left outside a first estimate of the span.

    Args:
        gradient: float64; each row is a combination of the layer's input vectors plus noise.
        precision: Machine epsilon of the type in which the gradient was stored (2^-23 for float32).
        arithmetic: Relative rounding error of the vectors that will be tested.
        device: Where vectors will be tested; None for the gradient's own device.
        guess: About how many directions the signal may have, where something is known: it costs time if wrong.
        shared: A vector that is a part of every input and known beforehand, the bias of a norm, in units of an input's
            length. It may belong to the span where it is too weak to be seen in the gradient.
        uneven: Whether the outputs are of several maps that are rounded unequally.

    Returns:
        The span, or None where the gradient is zero.

    Example:
        >>> inputs = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> gradient = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ inputs
        >>> span_of(gradient.float().double()).rank
        5
    """
    gradient = gradient[gradient.norm(dim=1) > 0]
    if not len(gradient):
        return None
    arithmetic = math.hypot(arithmetic, constants().projection_error)
    # Rounding: noise in proportion to each output's gradient. Where much more is left, it is measured instead.
    matrix = gradient / gradient.norm(dim=1, keepdim=True)
    found = signal_of(matrix, precision, guess=guess)
    if found.tail.largest > constants().uneven_rounding * found.floor:
        matrix = _evened(gradient, signal_of(gradient, precision).directions, otherwise=matrix)
        found = signal_of(matrix, precision, guess=guess)
    span = _span(found, matrix, arithmetic, device)
    if uneven:
        span = _without_the_worst(gradient, span, precision)
    return span if shared is None else _with_shared(span, matrix, shared.to(matrix), precision)


def _with_shared(span: Span, matrix: Tensor, shared: Tensor, precision: float) -> Span:
    """The span with a known direction in it, read off what is left of the gradient without that direction.

    Inputs may depend on each other but for their bias: `(t + p) s + b` of tokens and positions that close a cycle. The
    direction that this adds is as weak as the bias is short, and rows on the cycle would be turned away without it.
    """
    if not span.rank or span.saturated or _visible(span, shared):
        return span
    unit = shared / shared.norm()
    rest = matrix - (matrix @ unit)[:, None] * unit
    found = signal_of(rest, precision, guess=span.rank)
    strongest = found.values[:1] if len(found.values) else span.strengths[:1]
    signal, strengths = torch.cat([unit[:, None], found.directions], 1), torch.cat([strongest, found.values])
    rest = torch.cat([rest, strongest * unit[None]])
    return Span(signal, strengths, found.tail, len(rest), span.arithmetic, span.device, matrix=rest)


def _visible(span: Span, shared: Tensor) -> bool:
    """Whether a shared direction lies in the span, or would if it belonged there.

    As strong as the weakest, and shorter by its own length and by what is left of it on a cycle, it would stand clear.
    """
    clear = shared.norm() * span.strengths[-1] >= constants().clear_gap ** 2 * span.tail.largest
    return bool(clear) or bool(span.holds(shared.float()[None].to(span.device or span.signal.device)))


def _span(found: Signal, matrix: Tensor, arithmetic: float, device: torch.device | None) -> Span:
    spectrum = {"matrix": matrix} if found.complete is None else {"known": found.complete}
    return Span(found.directions, found.values, found.tail, len(matrix), arithmetic, device, **spectrum)


def _without_the_worst(gradient: Tensor, span: Span, precision: float) -> Span:
    """The span with its outputs evened again while noise of the worst is taken for signal, so that anything passes.

    No further than that a random vector lies outside, for a cut that comes near the signal turns true rows away.
    """
    room = constants().nearly_full * min(len(gradient), span.width)  # what fills nearly all leaves no noise to measure
    while 0 < span.rank < room and not span.clear and span.random_ratio < constants().screen_slack * span.bound:
        matrix = _evened(gradient, span.signal, otherwise=gradient)
        fewer = _span(signal_of(matrix, precision, guess=span.rank), matrix, span.arithmetic, span.device)
        if fewer.rank >= span.rank:
            break
        span = fewer
    return span


def _evened(gradient: Tensor, signal: Tensor, otherwise: Tensor) -> Tensor:
    """The gradient with its outputs scaled by the noise that each leaves outside a first estimate of the signal."""
    noise = (gradient - (gradient @ signal) @ signal.T).norm(dim=1)
    if signal.shape[1] == gradient.shape[1] or not noise.any():  # few entries moved: nothing is left outside
        return otherwise
    return gradient / noise.clamp(min=1e-6 * noise.max().item())[:, None]
