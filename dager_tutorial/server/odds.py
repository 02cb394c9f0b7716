"""Evidence that adds up: the log-odds that a vector was a row of the batch against that it was not.

Chapters `04_noise` and `11_limits`.

A test says yes or no; evidence of several taps has to be weighed. Both kinds of it, the residual and, where the rank is
full, the leverage, are turned into the logarithm of a likelihood ratio here, so that callers can add a prior and sum
over taps and blocks. Rows of one prefix in neighbouring taps are not independent: a sum of many taps ranks candidates
well and overstates how sure it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants

# A standard normal variable's median absolute value times this is 1.
MEDIAN_TO_DEVIATION = 1.4826


def residual_log_odds(ratio: Float[Tensor, " rows"], freedom: float, random_ratio: float) -> Float[Tensor, " rows"]:
    """Log-odds from the residual ratio z.

    In ln z a true row is spread evenly over the factor `model_error` by which the prediction may be off, each way,
    smeared by the chi-square noise of its residual. A false one is spread evenly from there to the z of a random
    direction, because near-copies of true rows leave residuals of any size. One row in `1 / miss_rate` follows no
    model: no tap alone can condemn a vector more surely than that.

    Args:
        ratio: float32, z as `Span.ratio` gives it.
        freedom: Effective number of noise directions.
        random_ratio: z of a random direction.

    Returns:
        float64, falling in z; at the span's bound it is `least_log_odds`.
    """
    scaled = (precise(ratio) / constants().model_error).square() * freedom / 2
    half = torch.full_like(scaled, freedom / 2)
    # Beyond any doubt where z is infinite: gammaincc has no value there.
    survival = torch.where(scaled.isfinite(), torch.special.gammaincc(half, scaled.clamp(max=1e300)), 0.0)
    return _mixed(survival, random_ratio).log()


def least_log_odds(random_ratio: float) -> float:
    """The log-odds of a vector at the bound of the span test, which `miss_rate` of the true rows exceed.

    Args:
        random_ratio: z of a random direction.
    """
    return float(_mixed(torch.tensor(constants().miss_rate, dtype=torch.float64), random_ratio).log())


def _mixed(survival: Tensor, random_ratio: float) -> Tensor:
    """The likelihood ratio of a residual that the share `survival` of true rows exceeds, outliers mixed in."""
    slack, outliers = math.log(constants().model_error), constants().miss_rate
    spread = slack + max(math.log(random_ratio), slack)
    return (1 - outliers) * survival * spread / (2 * slack) + outliers


@dataclass(frozen=True)
class Usual:
    """What a quantity usually is: its median and its robust standard deviation.

    Attributes:
        centre: The median.
        spread: 1.4826 times the median absolute deviation.
    """

    centre: float
    spread: float

    def deviations(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Deviations from the centre in units of the spread."""
        return (values - self.centre) / max(self.spread, 1e-6)


def usual(values: Float[Tensor, " sample"]) -> Usual:
    """Centre and spread of a sample, of which a few may be anything.

    >>> usual(torch.tensor([1.0, 2.0, 3.0, 1e9])).centre
    2.0
    """
    centre = values.median()
    return Usual(centre.item(), MEDIAN_TO_DEVIATION * (values - centre).abs().median().item())


def leverage_log_odds(log_leverage: Float[Tensor, " rows"], of_others: Usual) -> Float[Tensor, " rows"]:
    """Log-odds from the leverage, for taps whose rank is full.

    False rows have normal log-leverages. A true one's is lower, by a shift of which no more is known than that it is at
    most `leverage_shift` deviations: the likelihood is averaged over it, and what lies lower counts as the lowest. One
    row in `1 / miss_rate`, true or false, follows no model.

    Args:
        log_leverage: float32, as `Span.log_leverage` gives it.
        of_others: What log-leverages false rows have.

    Returns:
        float64, falling in the leverage.
    """
    shift, outliers = constants().leverage_shift, constants().miss_rate
    deviation = precise(of_others.deviations(log_leverage)).clamp(-shift, shift)
    normal = (-deviation.square() / 2).exp() / math.sqrt(2 * math.pi)
    false = (1 - outliers) * normal + outliers / (2 * shift)
    true = torch.special.ndtr(-deviation) / shift
    return ((1 - outliers) * true / false + outliers).log()


def chance_quantile(rate: float) -> float:
    """How many deviations above its mean a normal variable is with a probability of `rate`.

    >>> round(chance_quantile(0.025), 3)
    1.96
    """
    return float(norm.isf(rate))
