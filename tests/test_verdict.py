"""What is said of counts: a table of cases, and what must hold of all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import WORDS, every, family
from hypothesis import given
from hypothesis import strategies as st

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.inspection import prospects
from dager_tutorial.server.outcome import Ends, expected_rows
from dager_tutorial.server.reading import span_of
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.verdict import (
    no_beginning,
    no_candidates,
    of_leverage,
    of_prefixes,
    of_texts,
    unreadable,
)
from dager_tutorial.status import Status
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
UNSEEN = Ends(seen=False, confirmed=0, reported=3, rank=3)
ALL = Ends(seen=True, confirmed=3, reported=3, rank=3)
ALL_BUT_ONE = Ends(seen=True, confirmed=2, reported=3, rank=3)
FEWER = Ends(seen=True, confirmed=2, reported=2, rank=3)
UNCOUNTED = Ends(seen=True, confirmed=3, reported=3, rank=None)
NOTHING = Ends(seen=True, confirmed=0, reported=0, rank=3)

counts = st.none() | st.integers(0, 6)
all_ends = st.builds(Ends, st.booleans(), st.integers(0, 4), st.integers(0, 4), counts)


@pytest.mark.parametrize(
    "rows, expected, ends, late, status, said",
    [
        (9, 9, ALL, False, Status.TEXTS_COMPLETE, "all 9 distinct prefixes are explained, each text to its end"),
        (9, 9, ALL, True, Status.TEXTS_COMPLETE, "all 9"),  # what is proven needs no more time
        (9, 9, UNSEEN, False, Status.ROWS_COMPLETE, "no tap shows where texts end"),
        (9, 9, UNCOUNTED, False, Status.ROWS_COMPLETE, "noise hides how many texts end where"),
        (9, 9, FEWER, False, Status.ROWS_COMPLETE, "noise hides how many texts end where"),
        (9, 9, ALL_BUT_ONE, False, Status.PARTIAL, "a text ends where the last block sees no end"),
        (7, 9, ALL, False, Status.PARTIAL, "7 of 9 distinct prefixes confirmed"),
        (7, 9, ALL, True, Status.OUT_OF_TIME, "7 of 9 prefixes confirmed when the time budget was spent"),
        (11, 9, ALL, False, Status.PARTIAL, "11 prefixes pass where 9 are independent"),
        (7, None, ALL, False, Status.ENDS_CONFIRMED, "7 prefixes confirmed, and all 3 ends"),
        (7, None, ALL, True, Status.OUT_OF_TIME, "7 prefixes confirmed when the time budget was spent"),
        (7, None, ALL_BUT_ONE, False, Status.PARTIAL, "noise hides how many there are"),
        (7, None, FEWER, False, Status.PARTIAL, "noise hides how many there are"),
        (7, None, UNCOUNTED, False, Status.PARTIAL, "noise hides how many there are"),
        (7, None, UNSEEN, False, Status.PARTIAL, "noise hides how many there are"),
    ],
)
def test_prefixes(rows: int, expected: int | None, ends: Ends, late: bool, status: Status, said: str) -> None:
    found = of_prefixes(rows, expected, ends, late=late)
    assert found[0] is status and said in found[1]


@pytest.mark.parametrize(
    "ends, late, status, said",
    [
        (ALL, False, Status.ENDS_CONFIRMED, "3 of 3 texts confirmed by the last block"),
        (FEWER, False, Status.SATURATED, "2 of 3 texts confirmed"),
        (ALL_BUT_ONE, False, Status.SATURATED, "2 of 3 texts confirmed"),
        (UNSEEN, False, Status.SATURATED, "no block left to confirm a text"),
        (NOTHING, False, Status.SATURATED, "0 of 3 texts confirmed"),
        (FEWER, True, Status.OUT_OF_TIME, "2 of 3 texts confirmed by the last block when the time budget was spent"),
    ],
)
def test_leverage(ends: Ends, late: bool, status: Status, said: str) -> None:
    found = of_leverage(ends, ends.confirmed, late=late)
    assert found[0] is status and said in found[1]


@pytest.mark.parametrize(
    "rows, expected, late, status, said",
    [
        (9, 9, False, Status.TEXTS_COMPLETE, "all 9 rows"),
        (9, 9, True, Status.TEXTS_COMPLETE, "all 9 rows"),
        (4, 9, False, Status.PARTIAL, "4 of 9 rows confirmed: no seed leads to the others"),
        (4, 9, True, Status.OUT_OF_TIME, "4 of 9 rows confirmed when the time budget was spent"),
        (4, None, True, Status.OUT_OF_TIME, "4 rows confirmed when"),
        (4, None, False, Status.PARTIAL, "noise hides how many there are"),
    ],
)
def test_texts(rows: int, expected: int | None, late: bool, status: Status, said: str) -> None:
    found = of_texts(rows, expected, late=late)
    assert found[0] is status and said in found[1]


def test_no_text(tiny_gpt2: LanguageModel) -> None:
    said = {
        (late, saturated): no_candidates(late=late, saturated=saturated).status
        for late in (False, True)
        for saturated in (False, True)
    }
    assert said == {
        (False, False): Status.WRONG_MODEL,
        (False, True): Status.SATURATED,
        (True, False): Status.OUT_OF_TIME,
        (True, True): Status.OUT_OF_TIME,
    }
    whole, one = adapter_for(tiny_gpt2.network), adapter_for(family("llama", 64, 1).network)
    assert no_beginning(whole, late=False)[0] is Status.WRONG_MODEL
    assert no_beginning(whole, late=True)[0] is no_beginning(one, late=True)[0] is Status.OUT_OF_TIME
    status, diagnosis = no_beginning(one, late=False)
    assert status is Status.PARTIAL and "load more blocks" in diagnosis


@given(rows=st.integers(0, 6), expected=counts, ends=all_ends, late=st.booleans())
def test_a_proof_needs_equal_counts(rows: int, expected: int | None, ends: Ends, late: bool) -> None:
    """Nothing is complete unless as many rows were confirmed as there are, and a text's end is no guess."""
    prefixes, texts = of_prefixes(rows, expected, ends, late=late)[0], of_texts(rows, expected, late=late)[0]
    leverage = of_leverage(ends, ends.confirmed, late=late)[0]
    assert prefixes.rows_explained <= (rows == expected) and texts.rows_explained == (rows == expected)
    if prefixes is Status.TEXTS_COMPLETE:
        assert ends.seen and ends.confirmed == ends.reported == ends.rank
    if Status.ENDS_CONFIRMED in (prefixes, leverage):
        assert ends.seen and ends.confirmed == ends.reported == ends.rank and not late
    assert not leverage.rows_explained  # leverages count no rows
    assert late or Status.OUT_OF_TIME not in (prefixes, texts, leverage)
    assert not late or not {prefixes, texts, leverage} & {Status.PARTIAL, Status.WRONG_MODEL} or rows == expected


def clear(rank: int, width: int = 30) -> Span:
    draw = torch.Generator().manual_seed(rank)
    gradient = torch.randn(80, rank, generator=draw).double() @ torch.randn(rank, width, generator=draw).double()
    span = span_of(gradient.float().double())
    assert span is not None and span.rank == rank and span.clear
    return span


def test_only_clear_ranks_with_room_count_rows() -> None:
    noise = span_of(torch.randn(80, 30, generator=torch.Generator().manual_seed(0)).double())
    assert noise is not None and not noise.clear
    assert expected_rows([clear(4), noise, clear(7)]) == 7
    assert expected_rows([noise]) is expected_rows([]) is expected_rows([clear(29)]) is None


def spoilt(model: LanguageModel, texts: list[str], change: Callable[[str, Any], Any], **options: Any) -> Update:
    """The update of a batch, some of its gradients changed, or left out where they become None."""
    gradients = client_update(model, texts, config=ClientConfig(**options)).gradients
    changed = {name: change(name, tensor) for name, tensor in gradients.items()}
    return Update({name: tensor for name, tensor in changed.items() if tensor is not None})


def maps(model: LanguageModel, block: int) -> tuple[str, ...]:
    """Ends of the names of a block's query, key and value maps."""
    return adapter_for(model.network).tap(block, "query, key, value").parameters


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
def test_what_cannot_be_read_is_told_from_noise(model: LanguageModel, random_texts: Draw) -> None:
    texts, draw = random_texts(1, 8), torch.Generator().manual_seed(3)
    changes: list[tuple[Callable[[Any], Any], Status]] = [
        (lambda x: None, Status.NO_SIGNAL),
        (torch.zeros_like, Status.NO_SIGNAL),
        (lambda x: torch.randn(x.shape, generator=draw), Status.NOISE),
    ]
    for change, status in changes:
        update = spoilt(model, texts, lambda name, x: change(x) if name.endswith(maps(model, 0)) else x)  # noqa: B023
        outcome = unreadable(evidence_of(model, update))
        assert outcome is not None and outcome.status is status and not outcome.texts
        assert prospects(evidence_of(model, update)) == outcome.diagnosis
    assert unreadable(evidence_of(model, client_update(model, texts))) is None


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
def test_prospects(model: LanguageModel, random_texts: Draw) -> None:
    few, many = random_texts(2, 8), random_texts(12, 5, 8, 8)
    chance, first = random.Random(0), maps(model, 0)
    alike = [" ".join(chance.choices(WORDS[:12], k=9)) for _ in range(9)]  # few tokens, more rows than width

    def only_block_0(name: str, tensor: Any) -> Any:
        return tensor if name.endswith(first) else None

    task = "next_token" if adapter_for(model.network).causal else "classification"
    for update, said in (
        (client_update(model, few), "exposed: "),
        (spoilt(model, few, only_block_0), "tokens can be told from block 0; without"),
        (spoilt(model, many, only_block_0, task=task), "block 0 is saturated"),
        (client_update(model, alike), "tokens can be told from block 0, "),
    ):
        assert prospects(evidence_of(model, update)).startswith(said)
