"""The span of a layer's inputs, read off its gradient, and a test of membership that calibrates itself (chapter 2).

For a linear map `Y = X W` the gradient is `dW = X^T (dL/dY)`: every row of `dW^T` is a combination of the rows
of X. What arrives is that matrix plus noise (rounding, low precision, or noise added on purpose). This
file estimates the noise from the matrix itself and predicts from it how far a *true* row of X is expected to lie
from the estimated span. The ratio of the two, z, is about 1 for true rows on every model and precision, so that no
threshold has to be chosen by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from scipy.stats import chi2
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants
from dager_tutorial.server.odds import least_log_odds, residual_log_odds
from dager_tutorial.server.rank import numerical_rank, right_singular, rounding_floor


@dataclass(frozen=True)
class Span:
    """The row space of one tap's gradient with its noise.

    Attributes:
        directions: float64, the right singular vectors as columns: first the signal, then the rest.
        singular_values: float64, falling, of the gradient with its outputs scaled to equal noise.
        rank: How many directions carry signal.
        outputs: How many outputs have a gradient at all.
        arithmetic: Relative rounding error of the vectors that are tested against the span.
        device: Where vectors are tested; None for where the directions are, which need float64.
    """

    directions: Float[Tensor, "inputs inputs"]
    singular_values: Float[Tensor, " inputs"]
    rank: int
    outputs: int
    arithmetic: float = 0.0
    device: torch.device | None = None

    @property
    def width(self) -> int:
        """Number of inputs."""
        return self.directions.shape[0]

    @property
    def clear(self) -> bool:
        """Whether a gap that noise does not make stands below the signal, so that the rank is no guess."""
        return self.gap >= constants().clear_gap

    @property
    def saturated(self) -> bool:
        """True where the signal fills (nearly) all directions, so that no residual is left to test.

        One direction may stay free for another reason: a layer norm without bias removes it from every vector.
        """
        full = self.rank >= self.width - 1 or self.outputs <= self.rank
        return full or (not self.clear and self.rank >= constants().nearly_full * self.width)

    @property
    def blurred(self) -> bool:
        """Whether the span may be full, so that texts which are nearly right would pass.

        Without a clear gap a cut in the upper half of the width may run through the signal: what it leaves outside is
        then taken for noise, and much is forgiven.
        """
        return self.saturated or (not self.clear and 2 * self.rank >= self.width)

    @cached_property
    def _tail(self) -> tuple[float, float]:
        """Sums of the second and the fourth powers of the singular values of the noise."""
        squares = self.singular_values[self.rank :].square()
        return squares.sum().item(), squares.square().sum().item()

    @property
    def noise(self) -> float:
        """Noise energy outside the span, per unit of squared coefficients (dimensionless, squared)."""
        return self._tail[0] / max(self.outputs - self.rank, 1)

    @property
    def noise_floor(self) -> float:
        """Root mean square of a noise entry over that of an entry of the gradient, outputs scaled to equal noise."""
        free = max(self.outputs - self.rank, 1) * max(self.width - self.rank, 1)
        whole = self.singular_values.square().sum().item() / (self.outputs * self.width)
        return math.sqrt(self._tail[0] / free / whole)

    @property
    def gap(self) -> float:
        """Ratio of the last signal to the first noise singular value; infinite where the noise is exactly zero."""
        if self.rank == 0 or self.rank >= self.width:
            return 1.0
        below = self.singular_values[self.rank].item()
        return self.singular_values[self.rank - 1].item() / below if below > 0 else math.inf

    @property
    def freedom(self) -> float:
        """Effective number of noise directions outside the span (Satterthwaite)."""
        energy, fourth = self._tail
        return max(energy**2 / fourth, 1.0) if fourth > 0 else 1.0

    @cached_property
    def bound(self) -> float:
        """The largest z that a true row reaches, but for `miss_rate` of them."""
        return constants().model_error * math.sqrt(chi2.isf(constants().miss_rate, self.freedom) / self.freedom)

    @cached_property
    def random_ratio(self) -> float:
        """The z of a random direction: how far a vector lies outside that has nothing to do with the span."""
        leverage = self.singular_values[: self.rank].square().reciprocal().sum().item() / self.width
        expected = self.noise * leverage + self.arithmetic**2
        return math.sqrt((1 - self.rank / self.width) / max(expected, 1e-300))

    @property
    def between(self) -> float:
        """The geometric middle of `bound` and the z of a random direction: above it, a vector is surely no true row."""
        return max(self.bound, math.sqrt(self.bound * self.random_ratio))

    @property
    def worst(self) -> float:
        """The largest residual a true row of length 1 may have: where the weakest direction makes all of it up."""
        weakest = self.singular_values[self.rank - 1].item() if self.rank else 1.0
        return self.bound * math.sqrt(self.noise / weakest**2 + self.arithmetic**2)

    @cached_property
    def _coefficients(self) -> Tensor:
        return self.directions.float().to(self.device or self.directions.device)

    @cached_property
    def _weights(self) -> Tensor:
        return (1.0 / self.singular_values[: self.rank]).float().to(self._coefficients.device)

    def ratio(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, " rows"]:
        """Residual of each vector in units of the residual that a true row has: z.

        First-order perturbation theory: a row x = u M of the noisy gradient M carries the noise of the outputs that
        make it up, so that its squared residual is expected to be `noise * |u|^2`, where |u|^2 is the leverage
        `sum_j (x . v_j)^2 / s_j^2` over the signal directions. To it comes what rounding did to x itself.

        Args:
            vectors: float32.

        Returns:
            float32; infinite for a zero vector.
        """
        vectors = vectors.float()
        signal, rest = (vectors @ self._coefficients).tensor_split([self.rank], dim=1)
        leverage = (signal * self._weights).square().sum(1)
        size = vectors.square().sum(1)
        expected = self.noise * leverage + self.arithmetic**2 * size
        return torch.where(size > 0, (rest.square().sum(1) / expected.clamp(min=1e-37)).sqrt(), math.inf)

    def holds(self, vectors: Float[Tensor, "rows inputs"]) -> Bool[Tensor, " rows"]:
        """The hard test: which vectors are rows, as far as the residual tells.

        The same as `log_odds(vectors) >= least_log_odds`, without the logarithm.
        """
        ratio = self.ratio(vectors)
        return (precise(ratio) <= self.bound).to(ratio.device)  # beside float32 numbers the bound would be rounded

    def log_odds(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, " rows"]:
        """Log-odds (float64) that each vector was a row against that it was not, from its residual.

        See `odds.residual_log_odds`. Where the span is saturated there is no residual: `Evidence.log_odds` asks the
        leverage then.
        """
        return residual_log_odds(self.ratio(vectors), self.freedom, self.random_ratio)

    @property
    def least_log_odds(self) -> float:
        """The log-odds at which the hard test draws its line."""
        return least_log_odds(self.random_ratio)

    def log_leverage(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, " rows"]:
        """Logarithm of the leverage of each vector over all directions, signal or not (chapter 7).

        The leverage `sum_j (x . v_j)^2 / s_j^2` is the smallest squared weight |u|^2 with which the gradient's outputs
        combine to x. It stays informative where the rank is full: a true row needs little of the weak directions.

        Args:
            vectors: float32.

        Returns:
            float32, of the vectors scaled to length 1.
        """
        least = self.singular_values[0] * constants().projection_error
        weights = (1.0 / self.singular_values.clamp(min=least)).float().to(self._coefficients.device)
        vectors = vectors.float()
        leverage = ((vectors @ self._coefficients) * weights).square().sum(1)
        return leverage.clamp(min=1e-37).log() - vectors.square().sum(1).clamp(min=1e-37).log()

    def screen(self, count: int, generator: torch.Generator) -> Float[Tensor, "inputs chosen"]:
        """Random directions of the complement, scaled so that the projection keeps a residual's expected square.

        Args:
            count: How many, at most as many as the complement has.
            generator: Source of randomness, on the CPU.

        Returns:
            float32.
        """
        rest = self.directions[:, self.rank :]
        free = rest.shape[1]
        if count >= free:
            return self._coefficients[:, self.rank :]
        mix = torch.randn(free, count, generator=generator, dtype=torch.float64).to(rest.device)
        mix = torch.linalg.qr(mix).Q * math.sqrt(free / count)
        return (rest @ mix).float().to(self._coefficients.device)


def span_of(
    gradient: Float[Tensor, "outputs inputs"],
    *,
    precision: float = 2.0**-23,
    arithmetic: float = 0.0,
    device: torch.device | None = None,
) -> Span | None:
    """Read the span of a layer's inputs off its gradient.

    The gradient's outputs are first scaled to equal noise: rounding noise is proportional to an output's gradient;
    noise that was added is not, and shows in what is left outside a first estimate of the span.

    Args:
        gradient: float64; each row is a combination of the layer's input vectors plus noise.
        precision: Machine epsilon of the type in which the gradient was stored (2^-23 for float32).
        arithmetic: Relative rounding error of the vectors that will be tested.
        device: Where vectors will be tested; None for the gradient's own device.

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
    scaled = gradient / gradient.norm(dim=1, keepdim=True)
    values, directions, rank, floor = _decompose(scaled, precision)
    if rank < len(values) and values[rank] > constants().uneven_rounding * floor:
        scaled = _evened(gradient, precision, otherwise=scaled)
        values, directions, rank, _ = _decompose(scaled, precision)
    return Span(directions, values, rank, len(scaled), arithmetic, device)


def _evened(gradient: Tensor, precision: float, otherwise: Tensor) -> Tensor:
    """The gradient with its outputs scaled by the noise that each leaves outside a first estimate of the span."""
    values, directions, rank, _ = _decompose(gradient, precision)
    if rank >= len(values):
        return otherwise
    noise = (gradient @ directions[:, rank:]).norm(dim=1)
    return gradient / noise.clamp(min=1e-6 * noise.max().item())[:, None]


def _decompose(gradient: Tensor, precision: float) -> tuple[Tensor, Tensor, int, float]:
    """Singular values, right singular vectors, rank and rounding floor of outputs x inputs, float64."""
    values, directions = right_singular(gradient)
    floor = rounding_floor(gradient, precision)
    return values, directions, numerical_rank(values, len(gradient), floor), floor
