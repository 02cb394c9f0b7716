"""Which entries of a gradient were sent: where a client keeps the large ones, the others arrive as zeros.

Chapter `14_defences`.

A linear map's gradient is a sum of outer products: an output's row is zero as a whole or nowhere. Zeros among other
numbers are entries that somebody took out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.tap import KINDS
from dager_tutorial.server.constants import constants
from dager_tutorial.server.missing.quantised import bits_of


def sent_as(adapter: Adapter, gradients: Mapping[str, Tensor], precision: torch.dtype) -> tuple[int | None, bool]:
    """With how many bits a client sent its numbers, where a grid rounds them; and whether it sent some entries only.

    Numbers of 16 bits become zero where they are small: what is lost there, rounding explains.

    Args:
        adapter: The architecture.
        gradients: Gradients by backbone parameter name.
        precision: The coarsest dtype that the numbers show.
    """
    bits = bits_of(adapter, gradients)
    return bits, bits is None and torch.finfo(precision).bits >= 32 and is_pruned(adapter, gradients)


def is_pruned(adapter: Adapter, gradients: Mapping[str, Tensor]) -> bool:
    """Whether entries were taken out of gradients in the first or the last block.

    Args:
        adapter: The architecture.
        gradients: Gradients by backbone parameter name.
    """
    taps = (adapter.tap(block, kind) for block in {0, adapter.num_blocks - 1} for kind in KINDS)
    found = [gradients[name] for tap in taps for name in tap.parameters if name in gradients]
    return any(_absent(each) >= constants().fewest_absent for each in found)


def _absent(gradient: Float[Tensor, "rows columns"]) -> float:
    """The share of zeros in those rows and columns that hold anything."""
    kept = gradient != 0
    kept = kept[kept.any(1)][:, kept.any(0)]
    return 1.0 - float(kept.float().mean()) if kept.numel() else 0.0


def on_kept(rest: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left of an update at the entries that were sent.

    Args:
        rest: By the update's names.
        received: The update, by the same names.
    """
    return {name: torch.where(received[name].to(each.device) != 0, each, 0.0) for name, each in rest.items()}
