"""What a submission is worth: points for texts of the batch, points taken for false certainty, a cause for the rest.

Chapter `16_sealed_envelopes`. A text is *claimed* where the submission calls it certain, by the rule of
`Reconstruction.confirmed`: confirmed `whole`, or by its `rows` where the status says that all rows are explained. A
claim pays more than a guess and costs much where it is false: it is worth making from a probability of 4/5 on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dager_tutorial.challenges.seals import Seal
from dager_tutorial.errors import DagerError
from dager_tutorial.reconstruction import Reconstruction

CLAIMED, GUESSED, FALSE = 2, 1, -4
"""Points for a text of the batch that is claimed, for one that is guessed, and for a claim that is false."""
CAUSE, FULL = 1, 4
"""Points for a written cause where texts are missing, and on top for full marks."""
MOST_TEXTS, MOST_TOKENS, LARGEST_TOKEN = 100, 4096, 2**31
"""What a submission may hold."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Grade:
    """What a submission is worth.

    Attributes:
        claimed: Texts of the batch that were claimed.
        guessed: Texts of the batch that were given as guesses.
        false_claims: Claims that are not in the batch.
        false_guesses: Guesses that are not in the batch, which cost nothing.
        whole: Whether the texts that were found are the whole batch.
        cause: Whether a cause is written.
        full: Whether it earns full marks.
    """

    claimed: int
    guessed: int
    false_claims: int
    false_guesses: int
    whole: bool
    cause: bool
    full: bool

    @property
    def points(self) -> int:
        """All points, which false claims can make negative."""
        texts = CLAIMED * self.claimed + GUESSED * self.guessed + FALSE * self.false_claims
        return texts + CAUSE * (self.cause and not self.whole) + FULL * self.full

    @property
    def wants_cause(self) -> bool:
        """Whether something is missing and nobody has said why."""
        return not self.whole and not self.cause

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types only."""
        return asdict(self) | {"points": self.points}


def grade(seal: Seal, found: Reconstruction, cause: str = "") -> Grade:
    """Grade a submission. Equal texts count once.

    Args:
        seal: The envelope's.
        found: What is submitted.
        cause: Why texts are missing, in the red team's words; whether it is right is for people to say.

    Raises:
        DagerError: More or longer texts than a batch can have, or ids that are none.

    Example:
        >>> from dager_tutorial.challenges.seals import sealed
        >>> from dager_tutorial.status import Certainty, Confirmation, Status
        >>> sure = (Confirmation(Certainty.WHOLE),)
        >>> found = Reconstruction(((5, 7),), ("good film",), (1.0,), Status.TEXTS_COMPLETE, sure)
        >>> grade(sealed([(5, 7)], "whole", 1, ""), found).points, grade(sealed([(5,)], "whole", 1, ""), found).points
        (6, -4)
    """
    _check(found.sequences)
    claims = set(found.confirmed)
    guesses = set(found.sequences) - claims
    true_claims, true_guesses = _within(seal, claims), _within(seal, guesses)
    whole = seal.is_whole(true_claims | true_guesses)
    counts = (len(true_claims), len(true_guesses), len(claims - true_claims), len(guesses - true_guesses))
    written = bool(cause.strip())
    full = claims == true_claims and _reached(seal, len(true_claims), whole and not true_guesses, written)
    return Grade(*counts, whole=whole, cause=written, full=full)


def _within(seal: Seal, texts: Iterable[Tokens]) -> set[Tokens]:
    return {tokens for tokens in texts if seal.holds(tokens)}


def _reached(seal: Seal, claimed: int, whole: bool, cause: bool) -> bool:
    """Whether true claims are as many as full marks need."""
    if whole or seal.goal == "whole":
        return whole
    return cause and (seal.goal == "cause" or claimed >= seal.least)


def _check(sequences: tuple[Tokens, ...]) -> None:
    """Refuse what no batch can be, before time is spent on its hashes."""
    if len(sequences) > MOST_TEXTS:
        raise DagerError(f"{len(sequences)} texts are too many: submit at most {MOST_TEXTS}, the likeliest")
    for tokens in sequences:
        if not 0 < len(tokens) <= MOST_TOKENS:
            raise DagerError(f"a text of {len(tokens)} tokens: submit texts of 1 to {MOST_TOKENS}")
        if not all(0 <= token < LARGEST_TOKEN for token in tokens):
            raise DagerError("a token id is negative or too large: submit ids of the model's tokenizer")
