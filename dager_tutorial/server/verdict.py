"""Every verdict of the attack in one place: from what was counted to a status and one sentence.

Chapters `10_whole_attack` and `11_limits`.

Why equal counts are a proof. The span test passes every true row (but for `miss_rate` of them), so the true rows are
among the confirmed ones; and a matrix `X^T G` has at most as many independent rows as X has distinct ones, so the rank
is at most the number of true rows. Where as many rows are confirmed as the rank tells, nothing else can be among them.
"""

from __future__ import annotations

from dataclasses import replace

from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.tap import QKV
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import Ends, Outcome
from dager_tutorial.server.token_filter import tells_tokens
from dager_tutorial.status import Certainty, Status

Verdict = tuple[Status, str]


def unreadable(evidence: Evidence) -> Outcome | None:
    """The outcome where block 0 says nothing, so that no search can begin; None where it does say something."""
    tap = evidence.adapter.tap(0, QKV)
    status, span = evidence.nothing_in(tap), evidence.span(tap)
    if span is not None and evidence.drifts and not tells_tokens(evidence.adapter.first_input, span):
        status = Status.NOISE
    if status is None:
        return None
    said = {
        Status.NO_SIGNAL: "block 0's query, key and value gradients are missing or zero: nothing to test against",
        Status.NOISE: "nothing in block 0's query, key and value gradients stands out from noise",
    }
    return Outcome(status, said[status])


def no_candidates(*, late: bool, saturated: bool) -> Outcome:
    """The outcome where no token of the vocabulary lies in the span of block 0.

    Args:
        late: The time budget was spent before all were tested.
        saturated: The span is full.
    """
    if late:
        return Outcome(Status.OUT_OF_TIME, "the time budget was spent while tokens were tested against block 0")
    if saturated:
        return Outcome(Status.SATURATED, "block 0 is full, and no token stands out by its leverage")
    reason = "no token of the vocabulary lies in the span of block 0: another model, or noise of an unknown kind"
    return Outcome(Status.WRONG_MODEL, reason)


def no_beginning(adapter: Adapter, *, late: bool, queries: bool = False) -> Verdict:
    """The verdict where tokens pass the filter, and none of them begins a text.

    Args:
        adapter: The architecture.
        late: The time budget was spent.
        queries: Of block 0's queries, keys and values only the queries' maps were shared.
    """
    if late:
        return Status.OUT_OF_TIME, "tokens pass the filter; the time budget was spent before a text was found"
    if adapter.num_blocks == 1:
        return Status.PARTIAL, "tokens pass the filter; one block holds the rows that the loss reads, load more blocks"
    if queries:
        return Status.PARTIAL, "tokens pass the filter; a first token's query has no gradient, and no other was shared"
    reason = "tokens pass the filter, but none begins a text: another model, or noise of an unknown kind"
    return Status.WRONG_MODEL, reason


def of_prefixes(rows: int, expected: int | None, ends: Ends, *, late: bool) -> Verdict:
    """The verdict on a tree of confirmed prefixes.

    Args:
        rows: How many distinct prefixes were confirmed.
        expected: How many there are, where a rank with a clear gap tells.
        ends: What the last block says of the texts' ends.
        late: The time budget was spent.
    """
    if rows == expected:
        return _of_all_prefixes(rows, ends)
    if late:
        return Status.OUT_OF_TIME, f"{_of(rows, expected)} prefixes confirmed when the time budget was spent"
    if expected is None:
        return _of_uncounted_prefixes(rows, ends)
    if rows < expected:
        return Status.PARTIAL, f"{rows} of {expected} distinct prefixes confirmed"
    reason = f"{rows} prefixes pass where {expected} are independent: some are too alike to be told apart"
    return Status.PARTIAL, reason


def _of_all_prefixes(rows: int, ends: Ends) -> Verdict:
    """The verdict where as many prefixes are confirmed as there are."""
    if not ends.seen:
        return Status.ROWS_COMPLETE, f"all {rows} distinct prefixes are explained; no tap shows where texts end"
    if not ends.all_confirmed:
        return Status.PARTIAL, "a text ends where the last block sees no end"
    if not ends.complete:
        return Status.ROWS_COMPLETE, f"all {rows} distinct prefixes are explained; noise hides how many texts end where"
    return Status.TEXTS_COMPLETE, f"all {rows} distinct prefixes are explained, each text to its end"


def _of_uncounted_prefixes(rows: int, ends: Ends) -> Verdict:
    """The verdict where noise hides how many prefixes there are."""
    if ends.complete:
        return Status.ENDS_CONFIRMED, f"{rows} prefixes confirmed, and all {ends.rank} ends that the last block has"
    return Status.PARTIAL, f"{rows} prefixes confirmed; noise hides how many there are"


def of_leverage(ends: Ends, confirmed: int, *, late: bool) -> Verdict:
    """The verdict on a search by leverage, where the rank is full.

    Args:
        ends: What the last block says of the texts' ends.
        confirmed: How many of the texts it confirms.
        late: The time budget was spent.
    """
    if not ends.seen:
        said = "no block left to confirm a text"
    else:
        said = f"{_of(confirmed, ends.rank)} texts confirmed by the last block"
    reason = f"about as many prefixes as there are directions, told by summed evidence alone: {said}"
    return _unless_late(Status.ENDS_CONFIRMED if ends.complete else Status.SATURATED, reason, late=late)


def of_ranking(ends: Ends, confirmed: int, *, late: bool) -> Verdict:
    """The verdict on a search by rank, where no gap stands below the signal.

    Args:
        ends: What the last block says of the texts' ends.
        confirmed: How many of the texts it confirms.
        late: The time budget was spent.
    """
    said = f"{_of(confirmed, ends.rank)} texts confirmed by the last block" if ends.seen else "nothing confirms an end"
    reason = f"noise leaves no gap below the signal, texts are ranked by how well they fit: {said}"
    return _unless_late(Status.ENDS_CONFIRMED if ends.complete else Status.PARTIAL, reason, late=late)


def unexplained(*, late: bool) -> Verdict:
    """The verdict where no text explains all directions of a narrow adapter.

    Args:
        late: The time budget was spent.
    """
    reason = "no text was found that explains all of it, the likeliest is a guess"
    return _unless_late(Status.SATURATED, reason, late=late)


def of_difference(outcome: Outcome, unmoved: float, signs: str | None = None) -> Outcome:
    """What a search of a weight difference came to, and how much of it rounding hid.

    Args:
        outcome: What the search came to.
        unmoved: Share of the entries that were read and did not move.
        signs: What `of_signs` says.
    """
    told = "; ".join(
        filter(None, (signs, outcome.diagnosis, f"{unmoved:.0%} of the entries that were read did not move"))
    )
    hidden = unmoved >= constants().lost_in_rounding and not outcome.status.claims_all
    return replace(outcome, status=Status.BELOW_ROUNDING if hidden else outcome.status, diagnosis=told)


def of_prompt(outcome: Outcome, prompt: tuple[int, ...]) -> Outcome:
    """What a search came to, and whether the texts begin as they were said to.

    Args:
        outcome: What the search came to.
        prompt: Token ids with which every text was said to begin; none where nothing was said.
    """
    stray = sum(text.tokens[: len(prompt)] != prompt for text in outcome.texts)
    if not prompt or (outcome.texts and not stray):
        return outcome
    said = f"{stray} of {len(outcome.texts)} texts do not begin" if outcome.texts else "no text was found that begins"
    return replace(outcome, diagnosis=f"{outcome.diagnosis}; {said} with the prompt")


def too_few_entries() -> Outcome:
    """The outcome where so few entries were sent that no gradient of block 0 can be filled in."""
    reason = "so few entries were sent that no gradient of block 0 can be filled in; the embeddings' name the tokens"
    return Outcome(Status.NOISE, reason)


def of_filled(outcome: Outcome) -> Outcome:
    """What a search of a gradient with missing entries came to: rows lie in a span that was filled in.

    Only the simulation of what was found, compared entry by entry with what was sent, confirms texts.

    Args:
        outcome: What the search came to.
    """
    if outcome.status is Status.CERTIFIED:
        return replace(outcome, diagnosis=f"{outcome.diagnosis}; compared were the entries that were sent")
    texts = tuple(
        replace(text, confirmation=replace(text.confirmation, certainty=Certainty.ROWS))
        if text.confirmation.certainty is Certainty.WHOLE
        else text
        for text in outcome.texts
    )
    status = Status.PARTIAL if outcome.status.claims_all else outcome.status
    return replace(outcome, status=status, texts=texts, diagnosis=f"entries are missing: {outcome.diagnosis}")


def of_signs(named: int | None) -> str:
    """What is said of a weight difference whose entries all moved by the same amount.

    Args:
        named: How many tokens its embedding's rows name, or None.
    """
    said = "all entries moved by about the same amount, as in one step of Adam: signs are left, and their rank is full"
    return said if named is None else f"{said}; the rows of the embedding that moved name {named} tokens exactly"


def of_texts(rows: int, expected: int | None, *, late: bool) -> Verdict:
    """The verdict on an encoder's whole texts, from the rows they explain and those that a rank tells.

    Args:
        rows: How many rows the confirmed texts explain.
        expected: How many there are, where a rank with a clear gap tells.
        late: The time budget was spent.
    """
    if rows == expected:
        return Status.TEXTS_COMPLETE, f"all {expected} rows of the batch are explained"
    if late:
        return Status.OUT_OF_TIME, f"{_of(rows, expected)} rows confirmed when the time budget was spent"
    if expected is None:
        return Status.PARTIAL, f"{rows} rows confirmed; noise hides how many there are"
    return Status.PARTIAL, f"{rows} of {expected} rows confirmed: no seed leads to the others"


def of_full_texts(found: int, texts: int, *, late: bool) -> Verdict:
    """The verdict on an encoder's texts where rows cannot be counted.

    Args:
        found: How many texts the last block confirms.
        texts: How many it has a row of.
        late: The time budget was spent.
    """
    reason = f"about as many rows as the model is wide: {_of(found, texts)} texts confirmed by the last block"
    if found == texts:
        return Status.ENDS_CONFIRMED, reason
    return _unless_late(Status.SATURATED, reason, late=late)


def of_adapter(evidence: Evidence, outcome: Outcome) -> Outcome:
    """The outcome of a search, with what an adapter had room for where it had too little.

    Args:
        evidence: The update's gradients.
        outcome: What the search came to.
    """
    full = [(tap, span) for tap, span in evidence.spans.items() if span is not None and span.saturated]
    if outcome.status is not Status.SATURATED or not full:
        return outcome
    tap, span = full[0]
    numbers = f"at {tap.name} {span.rank} of the {min(span.width, span.outputs)} directions that it has are used"
    return replace(outcome, diagnosis=f"the adapter is too narrow for the batch, {numbers}: {outcome.diagnosis}")


def _unless_late(status: Status, reason: str, *, late: bool) -> Verdict:
    """A verdict, but for the time budget that was spent."""
    return (Status.OUT_OF_TIME, f"{reason} when the time budget was spent") if late else (status, reason)


def _of(rows: int, expected: int | None) -> str:
    return str(rows) if expected is None else f"{rows} of {expected}"
