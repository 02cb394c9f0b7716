"""What chapter `06_decoder_recovery` claims: the certificate theorem, how rows are counted, what a lost token costs."""

from __future__ import annotations

import pytest
import torch
from helpers import every
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dager_tutorial.evaluation.rouge import rouge_of
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.textbook.block_inputs import second_block_inputs

WIDTH = 4
Row = tuple[int, ...]
few = st.lists(st.tuples(*[st.integers(-1, 1)] * WIDTH).filter(any), min_size=1, max_size=7, unique=True)


def span_of(gradient: Tensor) -> tuple[Tensor, int]:
    """Orthonormal directions (as rows) of a gradient (outputs x inputs), and its rank."""
    rank = int(torch.linalg.matrix_rank(gradient, rtol=1e-9))
    return torch.linalg.svd(gradient).Vh[:rank], rank


def passing(rows: list[Row], directions: Tensor) -> set[Row]:
    """The rows that lie in a span."""
    vectors = torch.tensor(rows, dtype=torch.float64)
    return {
        row
        for row, rest in zip(rows, vectors - vectors @ directions.T @ directions, strict=True)
        if float(rest.norm()) < 1e-6
    }


def gradient_of(true: list[Row], outer: Tensor) -> Tensor:
    return outer.T @ torch.tensor(true, dtype=torch.float64)


@given(few, few, st.integers(0, 2**32 - 1))
def test_equal_counts_prove_that_nothing_is_missing_and_nothing_false(true: list[Row], others: list[Row], seed: int):
    """For any rows, dependent or not, and any candidates beside them: a small grid, so that both happen often."""
    draw = torch.Generator().manual_seed(seed)
    directions, rank = span_of(gradient_of(true, torch.randn(len(true), 9, generator=draw, dtype=torch.float64)))
    confirmed = passing(list({*true, *others}), directions)
    assert set(true) <= confirmed, "the premise: rows of G are independent"
    assert rank <= len(true) <= len(confirmed)
    assert len(confirmed) != rank or confirmed == set(true)


@given(few, few, st.integers(0, 2**32 - 1))
def test_the_certificate_arrives_where_rows_are_independent_and_no_other_passes(
    true: list[Row], others: list[Row], seed: int
):
    draw = torch.Generator().manual_seed(seed)
    directions, rank = span_of(gradient_of(true, torch.randn(len(true), 9, generator=draw, dtype=torch.float64)))
    assume(int(torch.linalg.matrix_rank(torch.tensor(true, dtype=torch.float64))) == len(true))
    confirmed = passing(list({*true, *others}), directions)
    assert (len(confirmed) == rank) == (confirmed == set(true))


def test_without_its_premise_the_certificate_lies():
    """Two rows of G are equal: both inputs are missed, their sum passes, and the counts agree."""
    true, false = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)], (1, 1, 0, 0)
    outer = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outer[1] = outer[0]
    directions, rank = span_of(gradient_of(true, outer))
    assert passing([*true, false], directions) == {true[2], false}
    assert rank == 2


def test_a_row_to_which_nothing_comes_back_is_no_row():
    """As the last token of a next-token loss: the counts agree on the others."""
    true = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]
    outer = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outer[2] = 0
    directions, rank = span_of(gradient_of(true, outer))
    assert passing(true, directions) == set(true[:2])
    assert rank == 2


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_a_text_without_its_last_token_has_the_rouge_of_the_formula(text: list[int]):
    n = len(text)
    assert rouge_of(tuple(text), tuple(text[:-1]))["rouge1"] == pytest.approx(2 * (n - 1) / (2 * n - 1))


def different_rows(prefixes: set[Row], window: int | None) -> int:
    """The solution of the chapter's exercise."""
    views = set()
    for prefix in prefixes:
        view = prefix if window is None else prefix[-window:]
        views.add(view[:1] if len(set(view)) == 1 else view)
    return len(views)


@every("tiny_llama", "mistral")
def test_rows_of_block_1_are_as_many_as_the_exercise_counts(model: LanguageModel):
    """Runs at the beginning and inside, longer than the window of four tokens, and texts that differ before it."""
    texts = [(7, 7, 7, 7, 7, 8), (9, 7, 7, 7, 7, 7, 6), (5, 6, 7, 8, 9, 10), (11, 6, 7, 8, 9, 10)]
    prefixes = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    inputs = [second_block_inputs(adapter_for(model.network), torch.tensor([one]))[0, -1] for one in sorted(prefixes)]
    rows: list[Tensor] = []
    for vector in inputs:
        if all(float((vector - row).norm()) > 1e-3 * float(row.norm()) for row in rows):
            rows.append(vector)
    window = getattr(model.network.config, "sliding_window", None)
    assert (window == 4) == (model.name == "tiny-mistral")
    assert len(rows) == different_rows(prefixes, window) < len(prefixes)
