"""How strong the noise on an update is, from entries that hold nothing else (chapter `14_defences`).

Most rows of an embedding's gradient belong to tokens of no text: all that they hold is noise, so that thirty million
entries measure its deviation. They also say whether it is even Gaussian noise at all: then the rows' mean squares
scatter by `sqrt(2 / width)`, and by nothing else.
"""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from scipy.stats import chi2
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants


def deviation_of(gradient: Float[Tensor, "rows width"]) -> float | None:
    """The deviation of the noise that was added to every entry of an update.

    Args:
        gradient: Of the tokens' embedding.

    Returns:
        None where its silent rows hold nothing, or what they hold is no even Gaussian noise.
    """
    squares, width = precise(gradient.float().square().sum(1)), gradient.shape[1]
    middle = squares.median().item()
    if not middle > 0:
        return None
    variance = middle / float(chi2.median(width))
    silent = squares[squares <= variance * _most(len(squares), width)]
    variance = silent.mean().item() / width
    scatter = (silent.std() / (variance * math.sqrt(2 * width))).item()
    even = 1 / constants().uneven_noise <= scatter <= constants().uneven_noise
    return math.sqrt(variance) if even and 2 * len(silent) > len(squares) else None


def outstanding(gradient: Float[Tensor, "rows width"], deviation: float) -> Int[Tensor, " found"]:
    """The rows that noise alone does not explain, not even one of so many.

    Args:
        gradient: Of an embedding.
        deviation: Of the noise on its entries.

    Returns:
        int64, sorted.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> rows = torch.randn(1000, 64, generator=draw)
        >>> rows[[3, 70]] += 2.0
        >>> outstanding(rows, 1.0)
        tensor([ 3, 70])
    """
    squares = precise(gradient.float().square().sum(1))
    return (squares > deviation**2 * _most(*gradient.shape)).nonzero()[:, 0]


def _most(rows: int, width: int) -> float:
    """The largest square, in units of the variance, that one of so many silent rows has."""
    return float(chi2.isf(constants().false_alarms / rows, width))
