"""The whole attack: an update and a model in, a reconstruction and a diagnosis out (chapter `10_whole_attack`).

Nothing here has a threshold to set. Each stage is a file of its own: `subspace` reads spans off the gradients,
`token_filter` finds candidates, `decoder` grows prefixes of causal models and tells where texts end, `unmixing` and
`encoder` find whole texts of bidirectional ones.
"""

from __future__ import annotations

from functools import partial

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.vocabulary import beginning
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.budget import AttackConfig, Budget, Progress
from dager_tutorial.server.completion.run import completed
from dager_tutorial.server.decoder.run import recover_prefixes
from dager_tutorial.server.drift import unmoved
from dager_tutorial.server.dropout.rows import dropout_rate
from dager_tutorial.server.dropout.run import recover_masked
from dager_tutorial.server.encoder.run import recover_texts
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.server.inspection import signs
from dager_tutorial.server.noisy.run import by_rows, noisy_search, through_noise
from dager_tutorial.server.outcome import Outcome
from dager_tutorial.server.verdict import of_adapter, of_difference, of_filled, of_prompt, unreadable
from dager_tutorial.status import Status
from dager_tutorial.stopwatch import Stopwatch, peak_memory_mb
from dager_tutorial.update import Update

SEARCH_STAGES = ("subspace", "filter", "search")
STAGES = (*SEARCH_STAGES, "completion")


def attack(
    model: LanguageModel,
    update: Update,
    *,
    head: Head | None = None,
    config: AttackConfig | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Recover the texts of a client's batch from its update.

    Args:
        model: The model both sides know.
        update: What the client sent, and all that is known of the batch.
        head: The head that the server handed out, and so the task. None: the task is read off the update, and of a
            freshly drawn head the seed is taken to be the usual one. Where it is another, texts come without labels.
        config: What the run may cost.
        progress: Called with the stage, what is done and the total or None.

    Returns:
        The recovered token sequences with a status; an uninformative update gives an empty one, never an exception.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.

    See chapter `10_whole_attack`, and Petrov et al., DAGER, NeurIPS 2024 for the attack this one builds on.
    """
    config = config or AttackConfig()
    watch = Stopwatch()
    budget = Budget.of(config, watch.begin, progress)
    evidence = evidence_of(model, update, watch)
    prompt = beginning(model.tokenizer, config.prompt) if config.prompt else ()
    outcome = _found(model, update, head, evidence, config, budget, prompt)
    if evidence.maps:
        outcome = of_adapter(evidence, outcome)
    if update.kind == "delta":
        outcome = of_difference(outcome, unmoved(evidence.gradients, evidence.used), signs(evidence))
    if evidence.pruned:
        outcome = of_filled(outcome)
    return _reconstruction(model, evidence, of_prompt(outcome, prompt))


def _found(
    model: LanguageModel,
    update: Update,
    head: Head | None,
    evidence: Evidence,
    config: AttackConfig,
    budget: Budget,
    prompt: tuple[int, ...],
) -> Outcome:
    """What the searches find that fit what was sent, and what simulating it proves."""
    dropout = dropout_rate(evidence)
    # Neither a step of an adapter nor a weight difference is simulated, nor masks that are not all known.
    complete = config.complete and update.kind == "gradient" and not evidence.maps and dropout is None
    search = partial(_searched, budget=budget, without=config.without, hand_over=complete, prompt=prompt)
    # To fill in what was not sent costs more than to ask the rows of embeddings, of which most is there.
    noisy = noisy_search(model, update, head, evidence, budget) if complete and evidence.pruned else None
    outcome = by_rows(noisy, evidence)
    if outcome is None:
        outcome = search(evidence) if dropout is None else recover_masked(evidence, dropout)
    if complete and outcome.status is not Status.CERTIFIED:
        outcome = completed(model, update, head, evidence, search, outcome, budget)
    if complete and outcome.status is not Status.CERTIFIED:
        if noisy is None and not budget.late:
            noisy = noisy_search(model, update, head, evidence, budget)
        outcome = through_noise(noisy, evidence, outcome, budget)
    return outcome


def _searched(
    evidence: Evidence, budget: Budget, without: frozenset[str], *, hand_over: bool, prompt: tuple[int, ...]
) -> Outcome:
    """The outcome of the search that fits the architecture, of an update or of what remains of one."""
    if isinstance(evidence.adapter, DecoderAdapter):
        return recover_prefixes(evidence, budget, prompt)
    nothing = unreadable(evidence)
    return recover_texts(evidence, budget, without, hand_over=hand_over, prompt=prompt) if nothing is None else nothing


def _reconstruction(model: LanguageModel, evidence: Evidence, outcome: Outcome) -> Reconstruction:
    """Put everything a reader may want to know into one record."""
    return Reconstruction(
        sequences=tuple(text.tokens for text in outcome.texts),
        texts=tuple(model.text_of(text.tokens) for text in outcome.texts),
        scores=tuple(text.ratio for text in outcome.texts),
        status=outcome.status,
        confirmations=tuple(text.confirmation for text in outcome.texts),
        labels=tuple(text.labels for text in outcome.texts),
        copies=tuple(text.copies for text in outcome.texts),
        with_targets=outcome.with_targets,
        batch_size=outcome.size,
        unexplained=outcome.unexplained,
        diagnosis=outcome.diagnosis,
        seconds=evidence.watch.report(*STAGES),
        ranks={tap: span.rank for tap, span in evidence.spans.items() if span is not None},
        model=model.name,
        n_parameters_used=evidence.parameters_used,
        peak_rss_mb=peak_memory_mb(),
    )
