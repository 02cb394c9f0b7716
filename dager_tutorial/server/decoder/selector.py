"""What a tree search is given to choose extensions by: residuals, leverages, or summed evidence.

Chapter `06_decoder_recovery`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.server.decoder.front import Extension, FirstBlock, Front


class Chosen(NamedTuple):
    """Extensions that a selector keeps.

    Attributes:
        pairs: int64: a prefix, or -1 where a text begins, and a candidate.
        ratios: float32, for each about 1 where it fits, larger where it fits less.
    """

    pairs: Int[Tensor, "pairs 2"]
    ratios: Float[Tensor, " pairs"]


@runtime_checkable
class Selector(Protocol):
    """Chooses which extensions of a front are kept.

    Attributes:
        block: Block 0, with the screen that the selector wants.
        widest: How many prefixes of one length are kept at most; the best are.
        longest_repeat: How far a rotary model's repeated first token is followed.
        certain: Whether more than `widest` choices mean that the tests have no power left, so that the search stops.
    """

    block: FirstBlock
    widest: int
    longest_repeat: int
    certain: bool

    def select(self, front: Front, extension: Extension) -> Chosen:
        """Choose extensions.

        Args:
            front: Prefixes of one length.
            extension: Candidates of the next position.
        """
