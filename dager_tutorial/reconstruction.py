"""What an attack gives back: token ids, their texts, how sure it is, and where the time went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

STATUSES = ("exact", "partial", "saturated", "no_signal", "no_candidates")
"""Every status a reconstruction can have, from the best answer to none."""


@dataclass(frozen=True)
class Reconstruction:
    """The server's answer to one update. It knows nothing of the truth; `metrics` compares the two.

    Attributes:
        sequences: Token ids of each recovered text, special tokens included as the model saw them, pads
            never.
        texts: The same, decoded, without the tokens that frame a text.
        scores: Calibrated residual ratio of each sequence: about 1 when it is true, larger is worse.
        status: ``exact`` (every token of the span is explained), ``partial``, ``saturated`` (the rank reached
            the hidden size; evidence used anyway), ``no_signal`` (zero or missing gradients) or
            ``no_candidates``.
        diagnosis: One sentence for people.
        seconds: Wall-clock seconds of the stages ``subspace``, ``filter``, ``search`` and ``total``.
        ranks: Tap name to numerical rank of its gradient.
        model: Name of the model.
        n_parameters_used: Number of gradient entries that the attack read.
        peak_rss_mb: Peak resident memory of the process, in megabytes.

    Raises:
        ValueError: The status is none of `STATUSES`, or there is not one text and score to each sequence.

    Example:
        >>> found = Reconstruction(((5, 7),), ("good film",), (1.02,), "exact")
        >>> found.to_json()["sequences"], found.to_json()["status"]
        ([[5, 7]], 'exact')
    """

    sequences: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    scores: tuple[float, ...]
    status: str
    diagnosis: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    model: str = ""
    n_parameters_used: int = 0
    peak_rss_mb: float = 0.0

    def __post_init__(self) -> None:
        """Check what every reader relies on."""
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        if not len(self.sequences) == len(self.texts) == len(self.scores):
            raise ValueError("a reconstruction needs one text and one score to each sequence")

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types only; a score that is not finite becomes null.

        Returns:
            A new dictionary, its keys in the order of the command line's documented output.
        """
        return {
            "status": self.status,
            "sequences": [[int(token) for token in sequence] for sequence in self.sequences],
            "texts": list(self.texts),
            "scores": [float(score) if math.isfinite(score) else None for score in self.scores],
            "seconds": {stage: float(seconds) for stage, seconds in self.seconds.items()},
            "peak_rss_mb": float(self.peak_rss_mb),
            "model": self.model,
            "n_parameters_used": int(self.n_parameters_used),
            "diagnosis": self.diagnosis,
            "ranks": {tap: int(rank) for tap, rank in self.ranks.items()},
        }
