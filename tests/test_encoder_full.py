"""Encoders whose spans are full: weak directions, the last block as the proof, and a search that hands over."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import WORDS, friends, truth

from dager_tutorial.client.step import client_update
from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QUERY
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.encoder.confirmation import LastConfirmer
from dager_tutorial.server.encoder.run import recover_texts
from dager_tutorial.server.encoder.search import TextSearch
from dager_tutorial.server.encoder.seeds import Seed, without_bridges
from dager_tutorial.server.encoder.tables import Clues, FirstBlock, Text
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.subspace import Span
from dager_tutorial.status import Certainty, Status


def crowd() -> list[str]:
    """Seven texts of eight words out of 36: fewer tokens and positions than 64 dimensions, and more rows."""
    draw = random.Random(7)
    return [" ".join(draw.choices(WORDS[:36], k=8)) for _ in range(7)]


# ---- full spans


def test_full_spans_still_give_texts(tiny_bert: LanguageModel) -> None:
    """70 rows in 64 dimensions: the search hands over its first true texts, each proven by the last block."""
    evidence = evidence_of(tiny_bert, client_update(tiny_bert, crowd()))
    span = evidence.span(evidence.adapter.tap(0, ATTENTION_OUTPUT))
    assert span is not None and span.blurred
    found = recover_texts(evidence, Budget(), hand_over=True)
    assert (found.status, "of 7 texts confirmed by the last block" in found.diagnosis) == (Status.SATURATED, True)
    assert found.texts and {text.tokens for text in found.texts} <= truth(tiny_bert, crowd())
    last = evidence.adapter.num_blocks - 1
    for text in found.texts:
        assert text.confirmation.certainty is Certainty.WHOLE
        assert {(tap.block, tap.kind) for tap in text.confirmation.taps} == {
            (last, kind) for kind in (QUERY, ATTENTION_OUTPUT, MLP)
        }


def test_the_last_block_refuses_what_is_nearly_right(tiny_bert: LanguageModel) -> None:
    """Its row tells one token from another, wherever it stands, a text cut short, and another order."""
    evidence = evidence_of(tiny_bert, client_update(tiny_bert, crowd()))
    adapter = evidence.adapter
    assert isinstance(adapter, EncoderAdapter)
    last = evidence.present(*(adapter.tap(adapter.num_blocks - 1, kind) for kind in (QUERY, ATTENTION_OUTPUT, MLP)))
    texts = sorted(truth(tiny_bert, crowd()))
    tokens = sorted({token for text in texts for token in text})
    confirmer = LastConfirmer(adapter, tuple(tokens), last, torch.device("cpu"))
    assert confirmer.rank == len(texts)
    for text in (tuple(tokens.index(token) for token in text) for text in texts):
        assert confirmer.confirms(text)
        others = {(*text[:at], other, *text[at + 1 :]) for at in range(len(text)) for other in range(len(tokens))}
        others |= {text[:length] for length in range(len(text))} | {(text[0], text[2], text[1], *text[3:])}
        assert not any(confirmer.confirms(other) for other in others - {text})


def test_without_the_last_block_full_spans_give_no_text(tiny_bert: LanguageModel) -> None:
    """Nothing else could prove one."""
    update = client_update(tiny_bert, crowd())
    kept = {name: each for name, each in update.gradients.items() if "layer.2." not in name}
    found = attack(tiny_bert, replace(update, gradients=kept))
    assert (found.status, found.sequences) == (Status.SATURATED, ())


def test_weak_directions_weigh_a_true_row_little() -> None:
    """In the mixture a direction counts as one over its strength, whichever way the mixture turns."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=draw, dtype=torch.float64)).Q
    values = torch.logspace(0, -4, 12, dtype=torch.float64)
    span = Span.cut(directions, values, 12, outputs=24)
    assert span.blurred
    table = torch.zeros(1, 1, 3, 4)
    mixture = FirstBlock(table, table, table, 1.0, span).mixture(5, draw).flatten(0, 1)
    lengths = (directions.T @ mixture).norm(dim=1)
    assert torch.allclose(lengths, torch.cat([torch.zeros(7).double(), values[-1] / values[-5:]]), atol=1e-12)


# ---- bridges, and handing over


def test_a_token_of_two_texts_is_nobodys_mate() -> None:
    """Two groups and a token that is in both: the groups stay as they are."""
    groups = friends(9, [1, 2, 3, 4], [5, 6, 7, 8])
    bridged = groups.clone()
    bridged[0, 1:] = bridged[1:, 0] = True
    assert torch.equal(without_bridges(bridged), groups)
    assert torch.equal(without_bridges(groups), groups)


@dataclass(frozen=True)
class Scripted(TextSearch):
    """A search in which some seeds lead to a text, and each that is asked is written down."""

    leading: frozenset[int] = frozenset()
    asked: list[int] | None = None

    def alone(self, seed: Seed) -> Text | None:
        assert self.asked is not None
        self.asked.append(seed.token)
        return (0, seed.token) if seed.token in self.leading else None


class Accepting:
    """Any text is as good as another."""

    def ratios(self, text: Text) -> torch.Tensor:
        return torch.ones(len(text))


@pytest.mark.parametrize("hand_over", [False, True])
def test_a_search_hands_over_when_it_stalls(hand_over: bool) -> None:
    """Not before something is found, and then after a few seeds that lead nowhere; without anybody to take, never."""
    tokens, seeds = 12, tuple((1, token) for token in range(1, 12))
    nowhere, zeros = torch.zeros(2, tokens, dtype=torch.bool), torch.zeros(2, tokens, dtype=torch.float64)
    clues = Clues(torch.arange(tokens), nowhere, nowhere, zeros, seeds, torch.zeros(tokens, tokens, dtype=torch.bool))
    asked: list[int] = []
    confirmer: Callable[[], object] = Accepting
    search = Scripted(clues, confirmer(), None, None, None, Budget(), hand_over, frozenset({6, 11}), asked)  # type: ignore[arg-type]
    found = search.run()
    stalled = constants().stalled
    if hand_over:
        assert (list(found), asked) == ([(0, 6)], list(range(1, 7 + stalled)))
    else:
        assert set(found) == {(0, 6), (0, 11)} and asked[:11] == list(range(1, 12))
