"""The attack on an update that holds Gaussian noise, was rounded to a grid, or of which some entries were sent.

Chapter `14_defences`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.guess import plausible_heads
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.decoder.ranked import ranked_prefixes
from dager_tutorial.server.deviation import outstanding
from dager_tutorial.server.embedding_rows import anywhere, noise_of, table_gradient
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.noisy.account import Account
from dager_tutorial.server.noisy.noise import Absent, Gaussian, Grid, Noise
from dager_tutorial.server.noisy.search import Search
from dager_tutorial.server.outcome import Outcome
from dager_tutorial.server.verdict import too_few_entries
from dager_tutorial.update import Update


def through_noise(search: Search | None, evidence: Evidence, outcome: Outcome, budget: Budget) -> Outcome:
    """Search an update through noise where the usual search has not explained it.

    Args:
        search: What `noisy_search` gives for the update.
        evidence: What the update says.
        outcome: What the usual search found.
        budget: What it may cost.

    Returns:
        The same outcome where there is nothing to search, or nothing was found.
    """
    if search is None:
        return outcome
    with evidence.watch.stage("completion"):
        search.run(lambda: [*(text.tokens for text in outcome.texts), *_ranked(evidence, search.tokens, budget)])
    return search.outcome(outcome)


def by_rows(search: Search | None, evidence: Evidence) -> Outcome | None:
    """What the rows of embeddings tell of an update of which some entries were sent, where that explains all of it.

    Args:
        search: What `noisy_search` gives for the update.
        evidence: What the update says.
    """
    with evidence.watch.stage("completion"):
        proven = search is not None and search.by_rows()
    return search.outcome(too_few_entries()) if search is not None and proven else None


def noisy_search(
    model: LanguageModel, update: Update, head: Head | None, evidence: Evidence, budget: Budget
) -> Search | None:
    """A search that looks through what an update holds besides texts' gradients.

    Args:
        model: The model both sides know.
        update: What the client sent.
        head: The head that the server handed out; None where it is to be guessed.
        evidence: What the update says.
        budget: What it may cost.

    Returns:
        None where it holds nothing else, or nothing stands out from that.
    """
    head = head or plausible_heads(update, evidence.adapter)[0]
    words = table_gradient(evidence, evidence.adapter.first_input.tokens)
    if head.task != "classification" or words is None:
        return None
    with evidence.watch.stage("completion"):
        simulator = Simulator(model, update, head, evidence.precision)
    noise = _noise(evidence, {name: update.gradients[name] for name in simulator.shared})
    if noise is None:
        return None
    # Rows of a grid that hold nothing are zero, and so are those of which no entry was sent.
    deviation = next(iter(noise.deviations.values()))
    tokens = outstanding(words, deviation) if isinstance(noise, Gaussian) else words.any(1).nonzero()[:, 0]
    return Search(Account(simulator, update.gradients, noise), tokens, budget) if len(tokens) else None


def _noise(evidence: Evidence, received: Mapping[str, Tensor]) -> Noise | None:
    """What an update holds besides texts; None where that is nothing, or is not known."""
    if evidence.pruned:
        return Absent.of(received)
    if evidence.bits is not None:
        return Grid.of(received, evidence.bits)
    deviation = noise_of(evidence)
    return Gaussian.of(received, deviation) if deviation else None


def _ranked(evidence: Evidence, tokens: Tensor, budget: Budget) -> list[Ids]:
    """What block 0 ranks best of a model whose embeddings know no positions, of the tokens that there are."""
    if not isinstance(evidence.adapter, DecoderAdapter):
        return []
    return ranked_prefixes(evidence, evidence.adapter, anywhere(tokens, None), budget)
