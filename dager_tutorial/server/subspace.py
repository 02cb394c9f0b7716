"""The span of a layer's inputs, read off its gradient, and a test of membership that calibrates itself.

For a linear map `Y = X W` the gradient is `dW = X^T (dL/dY)`: every row of `dW^T` is a combination of the rows
of X. What arrives is that matrix plus noise (rounding, low precision, or noise added on purpose). This
file estimates the noise from the matrix itself and predicts from it how far a *true* row of X is expected to lie
from the estimated span. The ratio of the two, z, is about 1 for true rows on every model and precision, so that no
threshold has to be chosen by hand. Chapter 2 of the book derives the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A true row is rejected once in a million times by its noise alone.
MISS_RATE = 1e-6
# Noise is not quite what the model of it says (a variance per output, independent entries): a true row's residual
# may be this many times the predicted one.
MODEL_ERROR = 4.0
# A gap between neighbouring singular values that noise alone does not produce, and how uneven rounding noise is.
CLEAR_GAP = 30.0
# Without a clear gap, a rank above this share of the width is one that noise has cut off.
NEARLY_FULL = 0.9
# Rounding errors of a gradient's sums are some times those of its storage; more than this is noise of another kind.
UNEVEN_ROUNDING = 100.0
# The largest rounding errors, of sums whose terms are as large as the gradient itself, over those of storing it.
LARGEST_ROUNDING = 1000.0
# Vectors are projected in float32, which is exact to about this share of their length.
PROJECTION_ERROR = 2.0**-23


@dataclass(frozen=True)
class Span:
    """The row space of one tap's gradient with its noise.

    Attributes:
        name: The tap's name, for people.
        directions: float64, inputs x inputs, the right singular vectors as columns: first the signal, then the rest.
        singular_values: float64, inputs, falling, of the gradient with its outputs scaled to equal noise.
        rank: How many directions carry signal.
        outputs: How many outputs have a gradient at all.
        arithmetic: Relative rounding error of the vectors that are tested against the span.
    """

    name: str
    directions: Tensor
    singular_values: Tensor
    rank: int
    outputs: int
    arithmetic: float = 0.0

    @property
    def width(self) -> int:
        """Number of inputs."""
        return self.directions.shape[0]

    @property
    def saturated(self) -> bool:
        """True where the signal fills (nearly) all directions, so that no residual is left to test.

        One direction may stay free for another reason: a layer norm without bias removes it from every vector.
        """
        full = self.rank >= self.width - 1 or self.outputs <= self.rank
        return full or (self.gap < CLEAR_GAP and self.rank >= NEARLY_FULL * self.width)

    @property
    def noise(self) -> float:
        """Noise energy outside the span, per unit of squared coefficients (dimensionless, squared)."""
        tail = self.singular_values[self.rank :].square().sum().item()
        return tail / max(self.outputs - self.rank, 1)

    @property
    def noise_floor(self) -> float:
        """Root mean square of a noise entry over that of an entry of the gradient, outputs scaled to equal noise."""
        free = max(self.outputs - self.rank, 1) * max(self.width - self.rank, 1)
        tail = self.singular_values[self.rank :].square().sum().item() / free
        return math.sqrt(tail / (self.singular_values.square().sum().item() / (self.outputs * self.width)))

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
        tail = self.singular_values[self.rank :].square()
        energy = tail.sum().item()
        return energy**2 / tail.square().sum().item() if energy > 0 else 1.0

    @property
    def bound(self) -> float:
        """The largest z that a true row reaches, but for `MISS_RATE` of them."""
        return MODEL_ERROR * math.sqrt(chi_square_bound(self.freedom))

    @property
    def between(self) -> float:
        """The geometric middle of `bound` and the z of a random direction: above it, a vector is surely no true row."""
        leverage = self.singular_values[: self.rank].square().reciprocal().sum().item() / self.width
        random = math.sqrt((1 - self.rank / self.width) / (self.noise * leverage + self.arithmetic**2))
        return max(self.bound, math.sqrt(self.bound * random))

    @cached_property
    def _coefficients(self) -> Tensor:
        return self.directions.float()

    @cached_property
    def _weights(self) -> Tensor:
        return (1.0 / self.singular_values[: self.rank]).float()

    def ratio(self, vectors: Tensor) -> Tensor:
        """Residual of each vector in units of the residual that a true row has: z.

        First-order perturbation theory: a row x = u M of the noisy gradient M carries the noise of the outputs that
        make it up, so that its squared residual is expected to be `noise * |u|^2`, where |u|^2 is the leverage
        `sum_j (x . v_j)^2 / s_j^2` over the signal directions. To it comes what rounding did to x itself.

        Args:
            vectors: float32, rows x inputs.

        Returns:
            float32, rows; infinite for a zero vector.
        """
        vectors = vectors.float()
        coefficients = vectors @ self._coefficients
        signal, rest = coefficients.tensor_split([self.rank], dim=1)
        leverage = (signal * self._weights).square().sum(1)
        size = vectors.square().sum(1)
        expected = self.noise * leverage + self.arithmetic**2 * size
        return torch.where(size > 0, (rest.square().sum(1) / expected.clamp(min=1e-37)).sqrt(), math.inf)

    def log_leverage(self, vectors: Tensor) -> Tensor:
        """Logarithm of the leverage of each vector over all directions, signal or not.

        The leverage `sum_j (x . v_j)^2 / s_j^2` is the smallest squared weight |u|^2 with which the gradient's outputs
        combine to x. It stays informative where the rank is full: a true row needs little of the weak directions.

        Args:
            vectors: float32, rows x inputs.

        Returns:
            float32, rows, of the vectors scaled to length 1.
        """
        weights = 1.0 / self.singular_values.clamp(min=self.singular_values[0] * PROJECTION_ERROR)
        vectors = vectors.float()
        leverage = ((vectors @ self._coefficients) * weights.float()).square().sum(1)
        return leverage.clamp(min=1e-37).log() - vectors.square().sum(1).clamp(min=1e-37).log()

    def screen(self, count: int, generator: torch.Generator) -> Tensor:
        """Random directions of the complement, scaled so that the projection keeps a residual's expected square.

        Args:
            count: How many, at most as many as the complement has.
            generator: Source of randomness, on the CPU.

        Returns:
            float32, inputs x directions.
        """
        rest = self.directions[:, self.rank :]
        free = rest.shape[1]
        if count >= free:
            return rest.float()
        mix = torch.randn(free, count, generator=generator, dtype=torch.float64).to(rest.device)
        mix = torch.linalg.qr(mix).Q * math.sqrt(free / count)
        return (rest @ mix).float()

    @property
    def worst(self) -> float:
        """The largest residual a true row of length 1 may have: where the weakest direction makes all of it up."""
        weakest = self.singular_values[self.rank - 1].item() if self.rank else 1.0
        return self.bound * math.sqrt(self.noise / weakest**2 + self.arithmetic**2)


def chi_square_bound(freedom: float) -> float:
    """Upper `MISS_RATE` quantile of a chi-square variable divided by its degrees of freedom (Wilson and Hilferty)."""
    normal = 4.753424308822899  # the upper 1e-6 quantile of the standard normal
    share = 2.0 / (9.0 * max(freedom, 1.0))
    return (1.0 - share + normal * math.sqrt(share)) ** 3


def numerical_rank(singular_values: Tensor, outputs: int, floor: float) -> int:
    """Count the singular values that noise cannot explain.

    Noise of equal variance has a largest singular value of sigma * (sqrt(outputs) + sqrt(inputs)) (the edge of
    random-matrix theory), with sigma taken from the values below the cut. The count is raised until the next value lies
    below that edge. Rounding noise is uneven, so that a few of its values pass, or, where its own spectrum falls
    steeply, most of them: where a clear gap stands just above the noise, or above what rounding makes at most, the cut
    is moved there.

    Args:
        singular_values: float64, inputs, falling.
        outputs: Number of rows of the matrix they belong to.
        floor: The least noise there can be, as a singular value: rounding of what was stored.

    Returns:
        The rank, from 0 to the number of inputs.
    """
    values = singular_values.tolist()
    inputs = len(values)
    energies = [0.0] * (inputs + 1)
    for index in range(inputs - 1, -1, -1):
        energies[index] = energies[index + 1] + values[index] ** 2

    def edge(cut: int) -> float:
        rows, columns = outputs - cut, inputs - cut
        if rows <= 0 or columns <= 0:
            return floor
        return max(floor, math.sqrt(energies[cut] / (rows * columns)) * (math.sqrt(rows) + math.sqrt(columns)))

    rank = 0
    while rank < min(inputs, outputs) and values[rank] > edge(rank):
        rank += 1
    following = [*values[1:], floor]
    for reach in (CLEAR_GAP * edge(rank), LARGEST_ROUNDING * floor):
        gaps = [
            (values[cut - 1] / max(following[cut - 1], 1e-300), cut)
            for cut in range(1, rank + 1)
            if following[cut - 1] <= reach
        ]
        ratio, cut = max(gaps, default=(0.0, rank))
        if ratio >= CLEAR_GAP:
            return cut
    return rank


def rounding_floor(gradient: Tensor, precision: float) -> float:
    """The largest singular value of the rounding errors that storing a gradient makes at least.

    Args:
        gradient: float64, outputs x inputs.
        precision: Machine epsilon of the stored type.
    """
    outputs, inputs = gradient.shape
    sigma = 0.2 * precision * gradient.norm().item() / math.sqrt(outputs * inputs)
    return sigma * (math.sqrt(outputs) + math.sqrt(inputs))


def right_singular(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (inputs, falling) and right singular vectors (columns) of outputs x inputs, float64."""
    outputs, inputs = gradient.shape
    if outputs < inputs:
        gradient = torch.cat([gradient, gradient.new_zeros(inputs - outputs, inputs)])
    if outputs > inputs:
        gradient = torch.linalg.qr(gradient, mode="r").R
    _, values, rows = torch.linalg.svd(gradient)
    return values, rows.T.contiguous()


def span_of(
    gradient: Tensor, *, name: str = "gradient", precision: float = 2.0**-23, arithmetic: float = 0.0
) -> Span | None:
    """Read the span of a layer's inputs off its gradient.

    The gradient's outputs are first scaled to equal noise: rounding noise is proportional to an output's gradient;
    noise that was added is not, and shows in what is left outside a first estimate of the span.

    Args:
        gradient: float64, outputs x inputs; each row is a combination of the layer's input vectors plus noise.
        name: The tap's name, for people.
        precision: Machine epsilon of the type in which the gradient was stored (2^-23 for float32).
        arithmetic: Relative rounding error of the vectors that will be tested.

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
    # Rounding: noise in proportion to each output's gradient. Where much more is left, it is measured instead.
    scaled = gradient / gradient.norm(dim=1, keepdim=True)
    values, directions, rank, floor = _decompose(scaled, precision)
    if rank < len(values) and values[rank] > UNEVEN_ROUNDING * floor:
        values, directions, rank, _ = _decompose(gradient, precision)
        noise = (gradient @ directions[:, rank:]).norm(dim=1)
        scaled = gradient / noise.clamp(min=1e-6 * noise.max().item())[:, None] if rank < len(values) else scaled
        values, directions, rank, floor = _decompose(scaled, precision)
    return Span(name, directions, values, rank, len(scaled), math.hypot(arithmetic, PROJECTION_ERROR))


def _decompose(gradient: Tensor, precision: float) -> tuple[Tensor, Tensor, int, float]:
    """Singular values, right singular vectors, rank and rounding floor of outputs x inputs, float64."""
    values, directions = right_singular(gradient)
    floor = rounding_floor(gradient, precision)
    return values, directions, numerical_rank(values, len(gradient), floor), floor
