"""The span of a layer's inputs, read off its gradient, and a test of membership that calibrates itself.

Chapter `04_noise`.

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
from dager_tutorial.server.decomposition import Spectrum, Tail, tail_of
from dager_tutorial.server.odds import least_log_odds, residual_log_odds
from dager_tutorial.server.rank import right_singular


@dataclass(frozen=True)
class Span:
    """The row space of one tap's gradient with its noise.

    Attributes:
        signal: float64, right singular vectors of the signal as columns.
        strengths: float64, their singular values, falling, of the gradient with its outputs scaled to equal noise.
        tail: What is known of the noise.
        outputs: How many outputs have a gradient at all.
        arithmetic: Relative rounding error of the vectors that are tested against the span.
        device: Where vectors are tested; None for where the directions are, which need float64.
        matrix: float64, the scaled gradient; of use only where the whole spectrum is not known yet.
        known: The whole spectrum, where it was computed.
        projection: A, where the span is that of projected vectors A x, which are projected before they are tested.
    """

    signal: Float[Tensor, "inputs rank"]
    strengths: Float[Tensor, " rank"]
    tail: Tail
    outputs: int
    arithmetic: float = 0.0
    device: torch.device | None = None
    matrix: Float[Tensor, "outputs inputs"] | None = None
    known: Spectrum | None = None
    projection: Float[Tensor, "inputs vectors"] | None = None

    @classmethod
    def cut(
        cls,
        directions: Float[Tensor, "inputs inputs"],
        singular_values: Float[Tensor, " inputs"],
        rank: int,
        outputs: int,
        arithmetic: float = 0.0,
    ) -> Span:
        """A span from a whole spectrum, cut at a rank.

        Args:
            directions: float64, the right singular vectors as columns.
            singular_values: float64, falling.
            rank: How many directions carry signal.
            outputs: How many outputs have a gradient at all.
            arithmetic: Relative rounding error of the vectors that are tested against the span.
        """
        spectrum = Spectrum(singular_values, directions)
        tail = tail_of(singular_values[rank:])
        return cls(directions[:, :rank], singular_values[:rank], tail, outputs, arithmetic, known=spectrum)

    @cached_property
    def _spectrum(self) -> Spectrum:
        """The whole spectrum, computed when it is first asked for."""
        if self.known is not None:
            return self.known
        assert self.matrix is not None, "a span has its whole spectrum or the matrix that it is read off"
        return Spectrum(*right_singular(self.matrix))

    @property
    def directions(self) -> Float[Tensor, "inputs inputs"]:
        """All right singular vectors (float64) as columns: first the signal, then the rest."""
        return self._spectrum.directions

    @property
    def singular_values(self) -> Float[Tensor, " inputs"]:
        """All singular values (float64), falling."""
        return self._spectrum.values

    @property
    def rank(self) -> int:
        """How many directions carry signal."""
        return self.signal.shape[1]

    @property
    def width(self) -> int:
        """Number of inputs."""
        return self.signal.shape[0]

    @property
    def free(self) -> int:
        """Number of directions outside."""
        return self.width - self.rank

    @property
    def clear(self) -> bool:
        """Whether a gap that noise does not make stands below the signal, so that the rank is no guess."""
        return self.gap >= constants().clear_gap

    @property
    def saturated(self) -> bool:
        """True where the signal fills (nearly) all directions, so that no residual is left to test.

        One direction may stay free for another reason: a layer norm without bias removes it from every vector.
        """
        room = min(self.width, self.outputs)  # a noise without a gap is told by many directions or not at all
        most = min(constants().nearly_full * room, room - constants().oversampling)
        return self.rank >= min(self.width - 1, self.outputs) or (not self.clear and self.rank >= most)

    @property
    def blurred(self) -> bool:
        """Whether the span may be full, so that texts which are nearly right would pass.

        Without a clear gap a cut in the upper half of the width may run through the signal: what it leaves outside is
        then taken for noise, and much is forgiven.
        """
        return self.saturated or (not self.clear and 2 * self.rank >= self.width)

    @property
    def noise(self) -> float:
        """Noise energy outside the span, per unit of squared coefficients (dimensionless, squared)."""
        return self.tail.energy / max(self.outputs - self.rank, 1)

    @property
    def noise_floor(self) -> float:
        """Root mean square of a noise entry over that of an entry of the gradient, outputs scaled to equal noise."""
        free = max(self.outputs - self.rank, 1) * max(self.width - self.rank, 1)
        whole = (self.strengths.square().sum().item() + self.tail.energy) / (self.outputs * self.width)
        return math.sqrt(self.tail.energy / free / whole)

    @property
    def gap(self) -> float:
        """Ratio of the last signal to the first noise singular value; infinite where the noise is exactly zero."""
        if self.rank == 0 or self.rank >= self.width:
            return 1.0
        return self.strengths[-1].item() / self.tail.largest if self.tail.largest > 0 else math.inf

    @property
    def freedom(self) -> float:
        """Effective number of noise directions outside the span (Satterthwaite)."""
        return max(self.tail.energy**2 / self.tail.fourth, 1.0) if self.tail.fourth > 0 else 1.0

    @cached_property
    def bound(self) -> float:
        """The largest z that a true row reaches, but for `miss_rate` of them."""
        return constants().model_error * math.sqrt(chi2.isf(constants().miss_rate, self.freedom) / self.freedom)

    @cached_property
    def random_ratio(self) -> float:
        """The z of a random direction: how far a vector lies outside that has nothing to do with the span."""
        leverage = self.strengths.square().reciprocal().sum().item() / self.width
        return math.sqrt((1 - self.rank / self.width) / max(self.noise * leverage + self.arithmetic**2, 1e-300))

    @property
    def between(self) -> float:
        """The geometric middle of `bound` and the z of a random direction: above it, a vector is surely no true row."""
        return max(self.bound, math.sqrt(self.bound * self.random_ratio))

    @property
    def worst(self) -> float:
        """The largest residual a true row of length 1 may have: where the weakest direction makes all of it up."""
        weakest = self.strengths[-1].item() if self.rank else 1.0
        gain = 1.0 if self.projection is None else torch.linalg.matrix_norm(self.projection, 2).item()
        return self.bound * gain * math.sqrt(self.noise / weakest**2 + self.arithmetic**2)

    def pulled(self, directions: Float[Tensor, "inputs chosen"]) -> Float[Tensor, "_ chosen"]:
        """Directions (float64) of a projected space as directions of the vectors themselves."""
        return directions if self.projection is None else self.projection.T @ directions

    def seen(self, vectors: Float[Tensor, "rows _"]) -> Float[Tensor, "rows inputs"]:
        """Vectors (float32) as they are tested: projected, where the span is of projected ones."""
        return vectors.float() if self.projection is None else vectors.float() @ self.projection.T.to(vectors).float()

    @cached_property
    def _basis(self) -> Tensor:
        """The signal in float32, where vectors are tested."""
        return self.signal.float().to(self.device or self.signal.device)

    @cached_property
    def _weights(self) -> Tensor:
        return (1.0 / self.strengths).float().to(self._basis.device)

    @cached_property
    def _complement(self) -> Tensor | None:
        """The rest in float32, where it is known; else what lies in the signal is subtracted."""
        return None if self.known is None else self.known.directions[:, self.rank :].float().to(self._basis.device)

    def _outside(self, vectors: Tensor, coefficients: Tensor) -> Tensor:
        """Squared lengths (rows) of what vectors have outside the span, given their coefficients inside."""
        if self._complement is not None:
            return (vectors @ self._complement).square().sum(1)
        rest = torch.addmm(vectors, coefficients, self._basis.T, alpha=-1)
        # Coefficients are rounded as their vectors are long, and the error lies inside the span: once more removes it.
        return torch.addmm(rest, rest @ self._basis, self._basis.T, alpha=-1).square().sum(1)

    def ratio(self, vectors: Float[Tensor, "rows _"]) -> Float[Tensor, " rows"]:
        """Residual of each vector in units of the residual that a true row has: z.

        First-order perturbation theory: a row x = u M of the noisy gradient M carries the noise of the outputs that
        make it up, so that its squared residual is expected to be `noise * |u|^2`, where |u|^2 is the leverage
        `sum_j (x . v_j)^2 / s_j^2` over the signal directions. To it comes what rounding did to x itself.

        Args:
            vectors: float32.

        Returns:
            float32; infinite for a zero vector.
        """
        vectors = self.seen(vectors)
        coefficients = vectors @ self._basis
        leverage = (coefficients * self._weights).square().sum(1)
        size = vectors.square().sum(1)
        expected = self.noise * leverage + self.arithmetic**2 * size
        outside = self._outside(vectors, coefficients)
        return torch.where(size > 0, (outside / expected.clamp(min=1e-37)).sqrt(), math.inf)

    def holds(self, vectors: Float[Tensor, "rows _"]) -> Bool[Tensor, " rows"]:
        """The hard test: which vectors are rows, as far as the residual tells.

        The same as `log_odds(vectors) >= least_log_odds`, without the logarithm.
        """
        ratio = self.ratio(vectors)
        return (precise(ratio) <= self.bound).to(ratio.device)  # beside float32 numbers the bound would be rounded

    def log_odds(self, vectors: Float[Tensor, "rows _"]) -> Float[Tensor, " rows"]:
        """Log-odds (float64) that each vector was a row against that it was not, from its residual.

        See `odds.residual_log_odds`. Where the span is saturated there is no residual: `Evidence.log_odds` asks the
        leverage then.
        """
        return residual_log_odds(self.ratio(vectors), self.freedom, self.random_ratio)

    @property
    def least_log_odds(self) -> float:
        """The log-odds at which the hard test draws its line."""
        return least_log_odds(self.random_ratio)

    def log_leverage(self, vectors: Float[Tensor, "rows _"]) -> Float[Tensor, " rows"]:
        """Logarithm of the leverage of each vector over all directions, signal or not (chapter `11_limits`).

        The leverage `sum_j (x . v_j)^2 / s_j^2` is the smallest squared weight |u|^2 with which the gradient's outputs
        combine to x. It stays informative where the rank is full: a true row needs little of the weak directions.

        Args:
            vectors: float32.

        Returns:
            float32, of the vectors scaled to length 1.
        """
        vectors, weights = self.seen(vectors), self.leverage_weights.sqrt()
        leverage = (vectors @ (self.directions * weights).float().to(self._basis.device)).square().sum(1)
        return leverage.clamp(min=1e-37).log() - vectors.square().sum(1).clamp(min=1e-37).log()

    @property
    def leverage_weights(self) -> Float[Tensor, " inputs"]:
        """What each direction's square counts in the leverage: float64, as far as float32 can resolve it."""
        least = self.singular_values[0] * constants().projection_error
        return self.singular_values.clamp(min=least) ** -2

    def screen(self, count: int, generator: torch.Generator) -> Float[Tensor, "_ chosen"]:
        """Random directions of the complement, scaled so that the projection keeps a residual's expected square.

        Args:
            count: How many, at most as many as the complement has.
            generator: Source of randomness, on the CPU.

        Returns:
            float32.
        """
        scale = math.sqrt(max(self.free / count, 1.0))
        return self.pulled(self.outside(count, generator) * scale).float().to(self._basis.device)

    def outside(self, count: int, generator: torch.Generator) -> Float[Tensor, "inputs chosen"]:
        """Random orthonormal directions (float64) of the complement; all of them where there are no more.

        Args:
            count: How many, at most.
            generator: Source of randomness, on the CPU.
        """
        if count >= self.free:
            return self.directions[:, self.rank :]
        # Drawn outside any basis: rounding turns the basis, and the mixtures must be the same on every machine.
        mix = torch.randn(self.width, count, generator=generator, dtype=torch.float64).to(self.signal.device)
        return torch.linalg.qr(mix - self.signal @ (self.signal.T @ mix)).Q
