"""What an attack gives back: token ids, their texts, how sure it is, and where the time went.

Chapter `10_whole_attack`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dager_tutorial.models.tap import Tap
from dager_tutorial.status import Certainty, Confirmation, Status


@dataclass(frozen=True)
class Reconstruction:
    """The server's answer to one update. It knows nothing of the truth; `evaluation.metrics` compares the two.

    Attributes:
        sequences: Token ids of each recovered text, special tokens included as the model saw them, pads
            never.
        texts: The same, decoded, without the tokens that frame a text.
        scores: Calibrated residual ratio of each sequence: about 1 when it is true, larger is worse.
        status: What is known of the batch.
        confirmations: For each sequence, whether it is confirmed and by which taps; empty where nobody says.
        diagnosis: One sentence for people.
        labels: For each sequence the classes it was trained with, one for each time it occurs; () where nothing tells.
        copies: For each sequence how often it stands in the batch; None where nothing tells.
        with_targets: Whether the sequences hold what the loss asked for and the network did not see: last tokens under
            the next-token loss, the tokens behind the masks.
        batch_size: How many texts the batch has, where it could be told: a mean over the batch cannot tell it from one
            in which every text stands twice as often.
        unexplained: Share of the update that remains when what was recovered is simulated and taken off it; None where
            it was not.
        seconds: Wall-clock seconds of the stages ``subspace``, ``filter``, ``search``, ``completion``
            and ``total``.
        ranks: Numerical rank of each tap's gradient that was read.
        model: Name of the model.
        n_parameters_used: Number of gradient entries that the attack read.
        peak_rss_mb: Peak resident memory of the process, in megabytes.

    Raises:
        ValueError: There is not one text, score and confirmation to each sequence.

    Example:
        >>> found = Reconstruction(((5, 7),), ("good film",), (1.02,), Status.PARTIAL)
        >>> found.to_json()["sequences"], found.to_json()["status"]
        ([[5, 7]], 'partial')
    """

    sequences: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    scores: tuple[float, ...]
    status: Status
    confirmations: tuple[Confirmation, ...] = ()
    diagnosis: str = ""
    labels: tuple[tuple[int, ...], ...] = ()
    copies: tuple[int | None, ...] = ()
    with_targets: bool = False
    batch_size: int | None = None
    unexplained: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ranks: dict[Tap, int] = field(default_factory=dict)
    model: str = ""
    n_parameters_used: int = 0
    peak_rss_mb: float = 0.0

    def __post_init__(self) -> None:
        """Check what every reader relies on."""
        if not len(self.sequences) == len(self.texts) == len(self.scores):
            raise ValueError("a reconstruction needs one text and one score to each sequence")
        for name in ("confirmations", "labels", "copies"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.sequences):
                raise ValueError(f"a reconstruction needs one of {name} to each sequence, or none at all")

    @property
    def confirmed(self) -> tuple[tuple[int, ...], ...]:
        """The sequences that are certain: confirmed to their ends, or row by row where all rows are explained.

        A beginning whose rows are confirmed is not certain as long as rows are missing: its text may go on.
        """
        pairs = list(zip(self.sequences, self.confirmations, strict=False))
        certain = {Certainty.WHOLE, Certainty.ROWS} if self.status.rows_explained else {Certainty.WHOLE}
        return tuple(ids for ids, confirmation in pairs if confirmation.certainty in certain)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types only; a score that is not finite becomes null.

        Returns:
            A new dictionary, its keys in the order of the command line's documented output.
        """
        return {
            "status": self.status.value,
            "sequences": [[int(token) for token in sequence] for sequence in self.sequences],
            "texts": list(self.texts),
            "scores": [float(score) if math.isfinite(score) else None for score in self.scores],
            "confirmations": [confirmation.to_json() for confirmation in self.confirmations],
            "labels": [list(labels) for labels in self.labels],
            "copies": list(self.copies),
            "with_targets": self.with_targets,
            "recovered_batch_size": self.batch_size,
            "unexplained": self.unexplained,
            "seconds": {stage: float(seconds) for stage, seconds in self.seconds.items()},
            "peak_rss_mb": float(self.peak_rss_mb),
            "model": self.model,
            "n_parameters_used": int(self.n_parameters_used),
            "diagnosis": self.diagnosis,
            "ranks": {tap.name: int(rank) for tap, rank in self.ranks.items()},
        }
