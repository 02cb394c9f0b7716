"""Unmixing against the rows themselves: marginals, incidence and sentence mates, with the limits they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import WORDS
from torch import Tensor

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.unmixing import Incidence, Marginals, incidence, mate_residual, same_text, unmix

Draw = Callable[..., list[str]]


def distinct_words(count: int, length: int, seed: int) -> list[str]:
    """Texts of words that occur once in all of them together."""
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(seed)).tolist()
    words = [WORDS[index] for index in order]
    return [" ".join(words[start * length : (start + 1) * length]) for start in range(count)]


def synthetic(model: LanguageModel, texts: list[str], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and positions of all rows, their random gradients (rows x 30, float64), and dW made of them."""
    adapter = adapter_for(model.network)
    pairs = [(token, place) for ids in encode(model.tokenizer, texts) for place, token in enumerate(ids)]
    tokens, places = torch.tensor(pairs).T
    vectors = adapter.first_input.vectors(tokens, places).double()
    gradients = torch.randn(len(pairs), 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tokens, places, gradients, gradients.T @ vectors


def deviations(model: LanguageModel, tokens: Tensor, places: Tensor) -> Tensor:
    """What the layer norm divides each row by."""
    source = adapter_for(model.network).first_input
    embedding = source.tokens[tokens].double() + source.positions[places].double()
    return (source.spread(embedding).square().mean(1) + source.epsilon).sqrt()


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_roberta", "tiny_gpt2"])
def test_marginals_are_the_sums_of_row_gradients(name: str, request: pytest.FixtureRequest, random_texts: Draw) -> None:
    """A_t and B_i equal sums over the rows, each divided by its deviation: the oracle adds them up one by one."""
    model = request.getfixturevalue(name)
    tokens, places, gradients, gradient = synthetic(model, random_texts(3, 5))
    scaled = gradients / deviations(model, tokens, places)[:, None]
    distinct = tokens.unique()
    found = unmix(adapter_for(model.network).first_input, gradient, distinct, int(places.max()) + 1)
    assert found is not None and found.positions is not None
    # [CLS] stands at position 0 only and nothing else does: these two are told up to a common part at most.
    for index, token in enumerate(distinct.tolist()):
        assert torch.allclose(found.tokens[index], scaled[tokens == token].sum(0), atol=1e-4)
    for place in range(int(places.max()) + 1):
        assert torch.allclose(found.positions[place], scaled[places == place].sum(0), atol=1e-4)


def test_rotary_models_have_one_row_per_token(tiny_llama: LanguageModel, random_texts: Draw) -> None:
    """Without positions in the input the marginals are the sums themselves."""
    tokens, _, gradients, gradient = synthetic(tiny_llama, random_texts(3, 6))
    distinct = tokens.unique()
    found = unmix(adapter_for(tiny_llama.network).first_input, gradient, distinct, 0)
    assert found is not None and found.positions is None
    sums = torch.stack([gradients[tokens == token].sum(0) for token in distinct])
    assert torch.allclose(found.tokens, sums, atol=1e-4)
    with pytest.raises(ValueError, match="rotary"):
        incidence(found, 1)


def test_more_tokens_and_positions_than_dimensions_cannot_be_unmixed(tiny_bert: LanguageModel) -> None:
    """The limit is tokens + positions, not rows: 64 dimensions hold 40 and 10, but not 60 and 12."""
    source = adapter_for(tiny_bert.network).first_input
    for texts, possible in ((distinct_words(4, 9, 0), True), (distinct_words(6, 10, 0), False)):
        tokens, places, _, gradient = synthetic(tiny_bert, texts)
        found = unmix(source, gradient, tokens.unique(), int(places.max()) + 1)
        assert (found is not None) == possible
        assert (len(tokens.unique()) + int(places.max()) + 1 < 64) == possible


def test_a_token_that_is_missing_is_noticed_and_one_too_many_gets_nothing(
    tiny_bert: LanguageModel, random_texts: Draw
) -> None:
    """What the tokens cannot explain would fill the answer: there is none then. A stranger's marginal is zero."""
    source = adapter_for(tiny_bert.network).first_input
    tokens, places, _, gradient = synthetic(tiny_bert, random_texts(2, 1))
    count, batch = int(places.max()) + 1, tokens.unique()
    right = unmix(source, gradient, batch, count)
    assert right is not None and right.fit < 1e-5
    assert unmix(source, gradient, batch[:-1], count) is None
    assert unmix(source, gradient, batch + 1, count) is None
    stranger = next(token for token in range(10, 20) if token not in batch)
    more = unmix(source, gradient, torch.cat([batch, torch.tensor([stranger])]), count)
    assert more is not None and more.positions is not None and right.positions is not None
    assert float(more.tokens[-1].norm()) < 1e-5 * float(right.tokens.norm())
    assert torch.allclose(more.tokens[:-1], right.tokens, atol=1e-4)
    assert torch.allclose(more.positions, right.positions, atol=1e-4)


def encoder_batch(model: LanguageModel, texts: list[str]) -> tuple[EncoderAdapter, list[list[int]], Tensor, Tensor]:
    """Adapter, token ids, distinct tokens, and the block-0 gradient of a classification update in float64."""
    evidence = evidence_of(model, client_update(model, texts, config=ClientConfig(dtype="float64")))
    assert isinstance(evidence.adapter, EncoderAdapter)
    ids = encode(model.tokenizer, texts)
    gradient = evidence.adapter.tap(0, QKV).gradient(evidence.gradients)
    assert gradient is not None
    return evidence.adapter, ids, torch.tensor(sorted({token for text in ids for token in text})), gradient


@pytest.mark.parametrize("seed", range(3))
def test_incidence_tells_where_a_word_stood(tiny_bert: LanguageModel, seed: int) -> None:
    """Every word of one occurrence has its largest coefficient, about 1, at its place, and log-odds that say so."""
    adapter, ids, tokens, gradient = encoder_batch(tiny_bert, distinct_words(3, 6, seed))
    found = unmix(adapter.first_input, gradient, tokens, 8)
    assert found is not None
    where = incidence(found, 3 * adapter.num_heads)
    count = Counter(token for text in ids for token in text)
    for text in ids:
        for place, token in enumerate(text):
            column = int((tokens == token).nonzero())
            if count[token] == 1:
                assert int(where.coefficients[:, column].argmax()) == place
                assert where.coefficients[place, column] == pytest.approx(1, abs=0.3)
                assert int((where.log_odds[:, column] > 0).sum()) == 1


def keys_and_queries(adapter: EncoderAdapter, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Queries and keys (float64, tokens x heads x width) of a text in block 0."""
    vectors = adapter.first_input.vectors(torch.tensor(ids), torch.arange(len(ids)))
    query, key, _ = adapter.project(0, vectors)
    return query.double(), key.double()


def test_a_query_gradient_names_its_sentence(tiny_bert: LanguageModel) -> None:
    """`dL/dq_i = sum_j c_ij k_j` with `sum_j c_ij = 0`: its own text's keys explain it, others' do not."""
    adapter, ids, tokens, gradient = encoder_batch(tiny_bert, distinct_words(3, 6, 7))
    found = unmix(adapter.first_input, gradient, tokens, 8)
    assert found is not None
    rows = found.tokens[:, : adapter.hidden_size].unflatten(1, (adapter.num_heads, adapter.head_width))
    for text in ids:
        words = torch.isin(tokens, torch.tensor(text[1:-1]))
        own, others = [], []
        for other in ids:
            residual = mate_residual(rows[words], keys_and_queries(adapter, other)[1])
            (own if other is text else others).append(residual)
        assert float(own[0].max()) < 1e-3
        assert float(torch.cat(others).min()) > 0.1
        # Without the constraint of the zero sum one more direction would be free: it is not needed.
        shifted = keys_and_queries(adapter, text)[1] + 5.0
        assert float(mate_residual(rows[words], shifted).max()) < 1e-3


def test_a_sentence_as_long_as_a_head_is_wide_has_any_gradient(tiny_bert: LanguageModel) -> None:
    """The limit of the mates: 18 tokens fill a head of 16 dimensions, and every row passes."""
    adapter = adapter_for(tiny_bert.network)
    assert isinstance(adapter, EncoderAdapter)
    long, short = (encode(tiny_bert.tokenizer, distinct_words(1, length, 3))[0] for length in (16, 6))
    rows = torch.randn(
        5, adapter.num_heads, adapter.head_width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert float(mate_residual(rows, keys_and_queries(adapter, long)[1]).max()) < 1e-6
    assert float(mate_residual(rows, keys_and_queries(adapter, short)[1]).min()) > 0.3


def test_rows_of_one_text_are_called_together() -> None:
    """Two texts of 30 tokens, a token of each at every position; but one stands at two positions, or may."""
    heads, draw = 6, torch.Generator().manual_seed(0)
    texts = torch.randn(2, heads * 16, generator=draw, dtype=torch.float64)
    rows = torch.cat([text + 0.5 * torch.randn(30, heads * 16, generator=draw) for text in texts])
    coefficients = torch.cat([torch.eye(30), torch.eye(30)], dim=1).double()
    marginals = Marginals(rows, None, 0.0, 1.0)

    mates = same_text(marginals, heads, Incidence(coefficients, torch.full((60,), 0.05)))
    own = torch.block_diag(torch.ones(30, 30), torch.ones(30, 30)).bool() & ~torch.eye(60).bool()
    assert (mates & own).sum() > max(0.9 * mates.sum(), 0.5 * own.sum())
    assert mates.equal(mates.T) and mates[3].any()

    coefficients[7, 3] = 0.9
    mates = same_text(marginals, heads, Incidence(coefficients, torch.full((60,), 0.05)))
    assert not mates[3].any() and mates[4].any()
