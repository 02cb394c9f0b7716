"""The report's sentences: verdicts in plain words, and what each of them rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dager_tutorial.evaluation.changes import CLIPPING, NOISE, UNCHANGED
from dager_tutorial.evaluation.ladder import UNREADABLE, Rung
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Status

NO_PROOF = "This is no proof that it is safe: another attack, or one with more time, may read more."
SEVERE, SERIOUS, OPEN = "severe", "serious", "open"
"""Everything or proven texts are read; something is; nothing is, which proves nothing."""

SHORT = {
    Status.CERTIFIED.value: "all, proven",
    Status.TEXTS_COMPLETE.value: "all, proven",
    Status.ROWS_COMPLETE.value: "all, proven but for ends",
    Status.ENDS_CONFIRMED.value: "all, by their ends",
    Status.PARTIAL.value: "a part",
    Status.SATURATED.value: "too full to test all",
    Status.NOISE.value: "only noise",
    Status.BELOW_ROUNDING.value: "mostly rounding",
    Status.NO_SIGNAL.value: "nothing to read",
    Status.OUT_OF_TIME.value: "time was too short",
    Status.WRONG_MODEL.value: "nothing that fits",
    UNREADABLE: "not readable",
}
"""What the attack says of itself, in a table's few words."""
PRIVATE = 1.0
"""Standard deviation of a number over the length of the update that is usual in differential privacy."""
STOPPED = 0.2
"""Share of the words below which this attack is said to fail: chance and common words give about a tenth."""

PROOFS = {
    Status.CERTIFIED: "The proof: the client's step, computed again from these texts, gives the update that was sent",
    Status.TEXTS_COMPLETE: "The proof: the texts explain as many independent directions as the gradients have, "
    "and each of them is confirmed to its end.",
    Status.ROWS_COMPLETE: "The proof: the texts explain as many independent directions as the gradients have. A text "
    "that is the beginning of another one, and words that are only asked for, may be missing.",
    Status.ENDS_CONFIRMED: "As many texts are confirmed to their ends as the last block shows.",
}
NOTHING = {
    Status.WRONG_MODEL: "The update does not fit this model, so that the audit says nothing of it. Check that model, "
    "weights and tokenizer are those of the client, or the update was changed in a way that the attack does not know.",
    Status.NO_SIGNAL: "The tensors that the attack reads were not sent, or are zero.",
    Status.NOISE: "The tensors that the attack reads hold nothing that stands out from noise.",
    Status.BELOW_ROUNDING: "The steps of the client are mostly smaller than the rounding of its weights.",
    Status.OUT_OF_TIME: "The search was stopped before it had ended: give it more time.",
}
CERTAINTIES = {
    "whole": "to its end",
    "rows": "all tokens, not the end",
    "guess": "not: the likeliest answer",
    "-": "not said",
}


@dataclass(frozen=True)
class Headline:
    """The verdict.

    Attributes:
        severity: `SEVERE`, `SERIOUS` or `OPEN`.
        sentence: What the update gives away, in one sentence.
        reason: What the sentence rests on, or what it does not say.
    """

    severity: str
    sentence: str
    reason: str


def headline(found: Reconstruction, named: int | None) -> Headline:
    """The verdict on an update, from what the attack found and nothing else.

    Args:
        found: What the attack found.
        named: How many tokens the embedding rows name, where they name any.
    """
    texts, proven = len(found.sequences), len(found.confirmed)
    if found.status.claims_all and proven:
        return Headline(SEVERE, _all(found), _proof(found))
    if proven:
        more = f" {_texts(texts - proven).capitalize()} more were read, but not proven." if texts > proven else ""
        sentence = f"This update gives away at least {_texts(proven)} word for word."
        return Headline(SEVERE, sentence, f"They are proven; whether there are more is not known.{more}")
    if texts:
        return Headline(SERIOUS, *_unproven(found))
    if named:
        sentence = (
            f"No text was read, but the embeddings name the {named:,} different tokens that the texts are made of."
        )
        return Headline(SERIOUS, sentence, f"{NOTHING.get(found.status, '')} {NO_PROOF}".strip())
    reason = f"{NOTHING.get(found.status, '')} {NO_PROOF}".strip()
    return Headline(OPEN, "Nothing could be read from this update by the attacks that were tried.", reason)


def _all(found: Reconstruction) -> str:
    """The sentence where nothing is missing."""
    certified = found.status is Status.CERTIFIED  # without that proof, weights are no counts
    size = (found.batch_size if certified else None) or len(found.sequences)
    if found.status is Status.ROWS_COMPLETE:
        return f"This update gives away all that the network saw: {_texts(size)}, word for word."
    if size == 1:
        return "This update gives away its only text, word for word."
    return f"This update gives away all {size:,} texts, word for word."


def _proof(found: Reconstruction) -> str:
    if found.status is Status.CERTIFIED and found.unexplained is not None:
        return f"{PROOFS[found.status]}; {100 * found.unexplained:.1g} % of it is left over, which is rounding."
    if found.status is Status.CERTIFIED:
        return f"{PROOFS[found.status]}, but for the noise that was added: what is left is as long as that noise."
    return PROOFS[found.status]


def _unproven(found: Reconstruction) -> tuple[str, str]:
    """Sentence and reason where there are texts, and none is proven."""
    whole = sum(each.certainty.value == "rows" for each in found.confirmations)
    if whole:
        sentence = f"{_texts(whole)}, or beginnings of texts, could be read token by token; they are not proven."
    else:
        sentence = f"No text could be proven; {_texts(len(found.sequences))} were guessed, which may be right in part."
    return sentence, "Treat them as disclosed until the owner has compared them; more may be readable."


def _texts(count: int) -> str:
    return f"{count:,} text" if count == 1 else f"{count:,} texts"


def ladder_summary(rungs: Sequence[Rung]) -> list[str]:
    """What the ladder came to: one sentence a kind of change, in the order of the ladder.

    Args:
        rungs: What was tried.
    """
    kinds = dict.fromkeys(rung.kind for rung in rungs if rung.kind != UNCHANGED)
    said = [_of_kind(kind, [rung for rung in rungs if rung.kind == kind]) for kind in kinds]
    late = sum(rung.late for rung in rungs)
    if late:
        said.append(
            f"For {late} of {len(rungs)} lines the time was too short: at least as much comes back as is shown (≥); "
            "more time (--change-seconds) tells."
        )
    return [sentence for sentence in said if sentence]


def _of_kind(kind: str, rungs: Sequence[Rung]) -> str:
    """What one kind of change does; nothing where time was too short to say."""
    best = max(rungs, key=lambda rung: rung.words)
    stopped = [rung for rung in rungs if _silent(rung)]
    if kind == CLIPPING and best.words >= STOPPED:
        return f"Clipping alone leaves {_left(best)}: it scales the update and hides nothing."
    if kind == NOISE:
        return _of_noise(rungs)
    failing = f"this attack fails with “{'”, “'.join(rung.name for rung in stopped)}”" if stopped else ""
    through = f"“{best.name}” leaves {_left(best)}" if best.words >= STOPPED else ""
    said = "; ".join(filter(None, (through, failing)))
    return f"{kind.capitalize()}: {said}." if said else ""


def _of_noise(rungs: Sequence[Rung]) -> str:
    through = [rung for rung in rungs if rung.words >= STOPPED]
    last = through[-1].level if through else 0.0
    silent = [rung for rung in rungs if _silent(rung) and rung.level > last]
    said = []
    if through:
        said.append(f"{_long(last)} leaves {_left(through[-1])}")
    if silent:
        said.append(f"{_long(silent[0].level)} keeps this attack below a fifth")
    if rungs[-1].deviation >= PRIVATE:
        said.append(f"noise with a proof, of differential privacy, would be {_long(rungs[-1].level)}")
    return f"Noise {'; '.join(said)}." if said else ""


def _silent(rung: Rung) -> bool:
    """Whether the attack read next to nothing, and had the time to."""
    return rung.words < STOPPED and not rung.late


def _left(rung: Rung) -> str:
    return f"{'at least ' if rung.late else ''}{100 * rung.words:.0f} % of the words"


def _long(level: float) -> str:
    return f"as long as {100 * level:g} % of the update" if level < 1 else f"{level:,.0f} times as long as the update"
