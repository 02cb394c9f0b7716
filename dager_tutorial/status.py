"""What a reconstruction claims, in words that mean the same for every architecture.

Chapters `10_whole_attack` and `11_limits`.

Three things can be proven from an update alone. *Everything*: what was recovered is certified where the client's step,
simulated from it, gives the update that was received. *Rows*: every true row of a span passes the span test (but for
`miss_rate` of them), and the rank is at most the number of distinct true rows; so as soon as as many distinct rows are
confirmed as the rank tells, the confirmed ones are the true ones. *Ends*: the same argument in the last block, where a
loss that reads each text's last token leaves rows of exactly these tokens.

*Everything* is said up to what no simulation knows. An update that was clipped is certified up to the factor, or one
for each tensor: numbers that make up for no text that is missing. Under Gaussian noise `certified` says less: what is
left of every tensor is as long as that noise, each text beats its likeliest neighbours by 6 deviations, and none that
adds more than noise hides is missing. That is a test with a chance of error; without noise a single wrong token shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from dager_tutorial.models.tap import Tap


class _Explained(StrEnum):
    """Members carry a meaning and an advice; they are, and print as, their plain values."""

    meaning: str
    advice: str

    def __new__(cls, value: str, meaning: str, advice: str) -> _Explained:
        """A member with its two sentences."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning, member.advice = meaning, advice
        return member


class Status(_Explained):
    """What is known of a batch, from the best answer to none.

    Example:
        >>> Status("partial") is Status.PARTIAL, f"{Status.PARTIAL}"
        (True, 'partial')
        >>> Status.NO_SIGNAL.meaning
        'the gradients that the attack reads are missing or zero'
    """

    CERTIFIED = (
        "certified",
        "the client's step, simulated from the recovered texts, is the update that was received",
        "treat every text of the batch, how often it occurs and its label as disclosed",
    )
    TEXTS_COMPLETE = (
        "texts_complete",
        "every row of the batch is explained and every text is confirmed to its end",
        "treat every text of the batch as disclosed",
    )
    ROWS_COMPLETE = (
        "rows_complete",
        "every row of the batch is explained, but no shared gradient shows where texts end inside others",
        "treat every text as disclosed; texts that begin others and last tokens that are only targets may be missing",
    )
    ENDS_CONFIRMED = (
        "ends_confirmed",
        "rows cannot be counted, but as many texts are confirmed to their ends as the last block has rows",
        "treat every text of the batch as disclosed",
    )
    PARTIAL = (
        "partial",
        "some of the batch is known, and not all of it is proven",
        "read for each text by what it is confirmed; the diagnosis says what is missing",
    )
    SATURATED = (
        "saturated",
        "there are about as many rows as the model is wide: no residual is left to test",
        "texts that are confirmed are certain, the others are the likeliest ones",
    )
    NOISE = (
        "noise",
        "the gradients that the attack reads hold nothing that stands out from noise",
        "no span attack reads this update; attacks that compare whole gradients may",
    )
    BELOW_ROUNDING = (
        "below_rounding",
        "most weights did not move: the client's steps are smaller than what rounding leaves of them",
        "what is reported was found in the rest; the learning rate, not a defence, hides the batch",
    )
    NO_SIGNAL = (
        "no_signal",
        "the gradients that the attack reads are missing or zero",
        "share block 0's query, key and value gradients to audit them",
    )
    OUT_OF_TIME = (
        "out_of_time",
        "the time budget was spent, or the run was stopped, before the search had ended",
        "what is reported was found so far; give more time",
    )
    WRONG_MODEL = (
        "wrong_model",
        "the gradients hold a span, and no text of this model lies in it",
        "check that model, weights and tokenizer are the client's, and that it trained without dropout",
    )

    @property
    def rows_explained(self) -> bool:
        """Whether every row of the batch is known, so that nothing is missing but, perhaps, ends."""
        return self in (Status.CERTIFIED, Status.TEXTS_COMPLETE, Status.ROWS_COMPLETE)

    @property
    def claims_all(self) -> bool:
        """Whether nothing is said to be missing: every row is known, or every text."""
        return self.rows_explained or self is Status.ENDS_CONFIRMED


class Certainty(Enum):
    """How much of a text is confirmed."""

    WHOLE = "whole"
    """Every row lies in the spans, and so does the place where the text ends."""
    ROWS = "rows"
    """Every row lies in the spans. Whether the text ends there no tap shows (alone, it may be a beginning), or noise
    leaves the spans without a clear gap, so that a false row may lie in them, too."""
    GUESS = "guess"
    """The likeliest answer; nothing confirms it."""


@dataclass(frozen=True)
class Confirmation:
    """Whether one text is confirmed, and by what.

    Attributes:
        certainty: How much of it is confirmed.
        taps: The taps whose spans confirm it, in the order in which they were asked.

    Example:
        >>> Confirmation(Certainty.GUESS).to_json()
        {'certainty': 'guess', 'by': []}
    """

    certainty: Certainty
    taps: tuple[Tap, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The record as JSON types only."""
        return {"certainty": self.certainty.value, "by": [tap.name for tap in self.taps]}
