"""Means with bootstrap intervals, printed as the paper prints them (chapter `15_reproducing_the_paper`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 5000
LEVEL = 0.95


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of some values and its 95 % interval, by the percentiles of a bootstrap.

    Args:
        values: One a batch.

    Returns:
        Mean, lower and upper end; the ends are not numbers for a single value.

    Example:
        >>> interval([1.0, 1.0, 1.0])
        (1.0, 1.0, 1.0)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    if np.ptp(values) == 0:  # scipy warns of what needs no drawing
        return mean, mean, mean
    drawn = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return mean, float(drawn.low), float(drawn.high)


def printed(values: Sequence[float], digits: int = 1) -> str:
    """A mean as the paper prints it: `98.4±0.9`, `99.3+0.7-1.7` where the interval is uneven, bare for one value.

    Args:
        values: One a batch.
        digits: Decimal places.

    Example:
        >>> printed([100.0]), printed([100.0, 100.0]), printed([100.0, 100.0, 100.0, 90.0])
        ('100.0', '100.0±0.0', '97.5+2.5-5.0')
    """
    mean, low, high = interval(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    up, down = f"{high - mean:.{digits}f}", f"{mean - low:.{digits}f}"
    return f"{mean:.{digits}f}±{up}" if up == down else f"{mean:.{digits}f}+{up}-{down}"
