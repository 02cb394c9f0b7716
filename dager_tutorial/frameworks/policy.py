"""What an update may give away and still be sent: the answer of an audit on the client's side.

Chapter `12_federated`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dager_tutorial.errors import DagerError
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.status import Status

MINUTE = AttackConfig(time_budget=60.0)
"""What an audit may cost where nothing else is said."""

_UNREAD = (Status.OUT_OF_TIME, Status.WRONG_MODEL)


@dataclass(frozen=True)
class Policy:
    """What an update may give away and still be sent.

    Attributes:
        confirmed: Share of the client's texts that may be confirmed; 0: none may.
        recovered: Share that may be recovered at all, likeliest answers that nothing confirms included: they are
            often right. 1: only what is confirmed counts.
        unread: Whether an update may be sent that the audit could not read although there is something in it: time ran
            out, or no text fits. That says what this attack finds in this time, not what another one finds.

    Raises:
        DagerError: A share is not between 0 and 1.

    Example:
        >>> found = Reconstruction(((5, 7),), ("good film",), (1.02,), Status.SATURATED)
        >>> Policy().objection(found, texts=4)
        '1 of 4 texts recovered (saturated), and the policy allows none'
        >>> Policy(recovered=0.5).objection(found, texts=4) is None
        True

    Chapter `12_federated`.
    """

    confirmed: float = 0.0
    recovered: float = 0.0
    unread: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        for name in ("confirmed", "recovered"):
            if not 0 <= getattr(self, name) <= 1:
                raise DagerError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")

    def objection(self, found: Reconstruction, texts: int | None = None) -> str | None:
        """Why an update may not be sent, in counts alone: the sentence may be shown to the server.

        Args:
            found: What the client's own attack on the update found.
            texts: How many texts the client trained on; None: as many as the attack tells.

        Returns:
            None where it may be sent.
        """
        certain, copies = set(found.confirmed), found.copies or (None,) * len(found.sequences)
        times = {ids: many or 1 for ids, many in zip(found.sequences, copies, strict=True)}
        recovered, confirmed = sum(times.values()), sum(times[ids] for ids in certain)
        total = texts or max(found.batch_size or 0, recovered)
        for name, count, share in (("confirmed", confirmed, self.confirmed), ("recovered", recovered, self.recovered)):
            counted = min(count, total)  # of what nothing confirms, there may be more than there are texts
            if counted > share * total:
                allowed = f"a share of {share:g}" if share else "none"
                return f"{counted} of {total} texts {name} ({found.status}), and the policy allows {allowed}"
        if found.status in _UNREAD and not self.unread:
            return f"the audit ended without an answer ({found.status}), and the policy allows none such"
        return None
