"""The attack on bidirectional models, stage by stage: spans, candidates, incidence, whole texts.

Chapter `08_encoder_recovery`.
"""

from __future__ import annotations

from torch import Tensor

from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, QUERY, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.candidates import candidates_of, named_alone
from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.confirmation import Confirmer, LastConfirmer
from dager_tutorial.server.encoder.full import FullSearch
from dager_tutorial.server.encoder.polish import Polish
from dager_tutorial.server.encoder.relaxation import Relaxation
from dager_tutorial.server.encoder.search import TextSearch
from dager_tutorial.server.encoder.seeds import without_bridges
from dager_tutorial.server.encoder.tables import Clues, FirstBlock, clues_of, first_block
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.outcome import FoundText, Outcome, expected_rows
from dager_tutorial.server.prompt import passing
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates
from dager_tutorial.server.unmixing import Incidence, incidence, same_text, unmix
from dager_tutorial.server.verdict import no_candidates, of_full_texts, of_texts
from dager_tutorial.status import Certainty, Confirmation, Status


def recover_texts(
    evidence: Evidence,
    budget: Budget,
    without: frozenset[str] = frozenset(),
    *,
    hand_over: bool = False,
    prompt: tuple[int, ...] = (),
) -> Outcome:
    """Find the tokens, where they stood, and text after text by the attention of block 0.

    Args:
        evidence: What a bidirectional model's update says; block 0's query, key and value gradients must hold something
            (`verdict.unreadable`).
        budget: What it may cost.
        without: Parts of the search to leave out, any of `PARTS`.
        hand_over: Return as soon as texts were found and others do not follow easily, because the caller takes the
            found ones off the update and asks again.
        prompt: Token ids with which every text is said to begin; where the update does not hold them they are left out.

    Returns:
        The confirmed texts, and what is known of the batch.

    See chapter `08_encoder_recovery`.
    """
    adapter = _encoder(evidence)
    first = evidence.span(adapter.tap(0, QKV))
    assert first is not None, "ask `unreadable` first"
    if adapter.num_blocks < 2:
        reason = "one block holds the rows that the loss reads, not whole texts: load more blocks"
        return Outcome(Status.PARTIAL, reason)
    if first.saturated and named_alone(evidence) is None:
        return Outcome(Status.SATURATED, "block 0 is full: even single tokens hide in the rank")
    with evidence.watch.stage("filter"):
        candidates = candidates_of(evidence, first, budget)
    late = budget.late
    if late or not candidates.count:
        return no_candidates(late=late, saturated=False)
    if passing(candidates, prompt) == len(prompt):
        candidates = candidates.beginning(prompt)
    with evidence.watch.stage("search"):
        return _untestable(evidence) or _searched(evidence, candidates, budget, without, hand_over=hand_over)


def _encoder(evidence: Evidence) -> EncoderAdapter:
    assert isinstance(evidence.adapter, EncoderAdapter)
    return evidence.adapter


def _untestable(evidence: Evidence) -> Outcome | None:
    """The outcome where no text can be confirmed whatever the candidates are; None where it can."""
    span = evidence.span(evidence.adapter.tap(0, ATTENTION_OUTPUT))
    if span is None:
        return Outcome(Status.PARTIAL, "block 0's attention output gradient was not shared: tokens, but no texts")
    if span.rank == 0:
        reason = "nothing in block 0's attention output gradient stands out from noise: tokens, but no texts"
        return Outcome(Status.PARTIAL, reason)
    if span.blurred and not _last(evidence):
        reason = "about as many rows as the model is wide: tokens can be told, whole texts cannot"
        return Outcome(Status.SATURATED, reason)
    if not span.blurred and not _deeper(evidence):
        reason = "no tap beyond block 0's attention output is left to confirm a text by"
        return Outcome(Status.PARTIAL, reason)
    return None


def _deeper(evidence: Evidence) -> dict[Tap, Span]:
    """Spans of deeper taps that hold every row of the batch: each must lie in all of them.

    Whatever the loss reads, it reaches all rows of a block through the attention of the next one. The last block
    has no next one.
    """
    adapter = evidence.adapter
    blocks = [adapter.tap(block, QKV) for block in (1, 2) if block < adapter.num_blocks - 1]
    return _sharp(evidence, *blocks) or _sharp(evidence, adapter.tap(0, MLP))


def _last(evidence: Evidence) -> dict[Tap, Span]:
    """Spans of the last block's taps that have one row for each text: where a loss reads one, all but key and value."""
    adapter = evidence.adapter
    taps = [adapter.tap(adapter.num_blocks - 1, kind) for kind in (QUERY, ATTENTION_OUTPUT, MLP)]
    found = evidence.present(*taps)
    return {tap: span for tap, span in found.items() if span.clear and not span.blurred}


def _sharp(evidence: Evidence, *taps: Tap) -> dict[Tap, Span]:
    """Those spans that a text which is nearly right does not pass."""
    return {tap: span for tap, span in evidence.present(*taps).items() if not span.blurred}


def _searched(
    evidence: Evidence, candidates: Candidates, budget: Budget, without: frozenset[str], *, hand_over: bool
) -> Outcome:
    """Search for whole texts, and say what came of it."""
    search = _search(evidence, candidates, budget, without, hand_over=hand_over)
    found, confirmer = search.run(), search.confirmer
    if isinstance(confirmer, LastConfirmer):
        verdict = of_full_texts(len(found), confirmer.rank, late=budget.late)
        certainty = Certainty.WHOLE
    else:
        verdict = of_texts(sum(map(len, found)), search.expected, late=budget.late)
        # Without a clear gap anywhere false rows pass, too: the tests have little power under strong noise.
        certainty = Certainty.WHOLE if search.expected is not None else Certainty.ROWS
    confirmation = Confirmation(certainty, confirmer.taps)
    texts = tuple(FoundText(confirmer.ids(text), ratio, confirmation) for text, ratio in found.items())
    return Outcome(*verdict, texts)


def _search(
    evidence: Evidence, candidates: Candidates, budget: Budget, without: frozenset[str], *, hand_over: bool
) -> TextSearch:
    """The search with all of its tables and those of its parts that are wanted."""
    adapter = _encoder(evidence)
    span = evidence.span(adapter.tap(0, ATTENTION_OUTPUT))
    assert span is not None
    clues = _clues(evidence, candidates, span, incident="incidence" not in without)
    block = first_block(adapter, clues.tokens, len(clues.wide), span)
    generator = budget.generator()
    directions = block.mixture(constants().polish_directions, generator).to(block.query)
    return (FullSearch if span.blurred else TextSearch)(
        clues,
        _confirmer(evidence, clues, block),
        Relaxation(block, generator, budget) if "relaxation" not in without else None,
        Polish(block, clues.wide, directions, budget) if "polish" not in without else None,
        None if span.blurred else expected_rows([span, *_deeper(evidence).values()]),
        budget,
        hand_over,
    )


def _confirmer(evidence: Evidence, clues: Clues, block: FirstBlock) -> Confirmer | LastConfirmer:
    """What tests whole texts: every row where directions are free, else the one that the last block has."""
    adapter, tokens = _encoder(evidence), tuple(clues.tokens.tolist())
    if block.span.blurred:
        return LastConfirmer(adapter, tokens, _last(evidence), block.query.device)
    return Confirmer(adapter, tokens, block, block.span, _deeper(evidence))


def _clues(evidence: Evidence, candidates: Candidates, span: Span, *, incident: bool) -> Clues:
    """What block 0 says of the pairs, with or without the incidence."""
    where, together = _incidence(evidence, candidates) if incident else (None, None)
    return clues_of(candidates, where, together, span.signal.device)


def _incidence(evidence: Evidence, candidates: Candidates) -> tuple[Incidence | None, Tensor | None]:
    """Which token stood where, and which stood together, as far as block 0's gradient determines it."""
    adapter = _encoder(evidence)
    gradient = adapter.tap(0, QKV).gradient(evidence.gradients)
    if gradient is None or len(gradient) != 3 * adapter.hidden_size:
        return None, None
    marginals = unmix(adapter.first_input, gradient, candidates.distinct(), len(candidates.tokens))
    if marginals is None:
        return None, None
    heads = 3 * adapter.num_heads
    where = incidence(marginals, heads)
    return where, without_bridges(same_text(marginals, heads, where))
