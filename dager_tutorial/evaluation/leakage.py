"""What an attack knows of a batch, in one record: what came back, and whether what it calls certain is true."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from dager_tutorial.client.batch import Truth
from dager_tutorial.evaluation.metrics import score, wanted
from dager_tutorial.reconstruction import Reconstruction


@dataclass(frozen=True)
class Leakage:
    """What an update gave away.

    Attributes:
        status: What the attack says of it.
        exact: Share of the texts that came back token by token.
        rouge1: ROUGE-1 of the assigned pairs, 0 to 1.
        rouge2: ROUGE-2 likewise.
        recall: Share of the batch's tokens that occur in what came back, in any text and order.
        confirmed: Share of the texts that came back and that the attack knows to be right.
        false: Texts that the attack calls confirmed and that are none of the batch.
        seconds: Seconds that the attack took.
    """

    status: str
    exact: float
    rouge1: float
    rouge2: float
    recall: float
    confirmed: float
    false: int
    seconds: float

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        """The record as JSON types.

        Args:
            prefix: What each name begins with.
        """
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


def leakage(found: Reconstruction, truth: Truth) -> Leakage:
    """Compare a reconstruction with the batch.

    Args:
        found: What an attack returned.
        truth: What the client kept.
    """
    points, total = score(found, truth), found.seconds.get("total", 0.0)
    return Leakage(
        found.status.value,
        points.exact,
        points.rouge1,
        points.rouge2,
        _recall(found, truth),
        confirmed_share(found, truth),
        false_confirmed(found, truth),
        total,
    )


def confirmed_share(found: Reconstruction, truth: Truth) -> float:
    """Share of the texts that came back and that the attack knows to be right.

    Args:
        found: What an attack returned.
        truth: What the client kept.
    """
    certain, texts = set(found.confirmed), wanted(found, truth)
    return sum(ids in certain for ids in texts) / len(texts)


def false_confirmed(found: Reconstruction, truth: Truth) -> int:
    """How many texts the attack calls confirmed that are none of the batch.

    Args:
        found: What an attack returned.
        truth: What the client kept.
    """
    return len(set(found.confirmed) - set(wanted(found, truth)))


def _recall(found: Reconstruction, truth: Truth) -> float:
    """Share of the true tokens that came back, each as often as it is there at most; frames are left out."""
    true = Counter(token for ids in wanted(found, truth) for token in ids if token not in truth.frame)
    back = Counter(token for ids in found.sequences for token in ids)
    return (true & back).total() / max(1, true.total())
