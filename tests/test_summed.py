"""The search by summed evidence: what still comes back when there are more prefixes than the model is wide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import every, random_model, searched, truth, word_tokenizer
from transformers import GPT2Config, LlamaConfig

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update, play
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import FirstBlock
from dager_tutorial.server.decoder.passage import Cache, Passage, Rows
from dager_tutorial.server.decoder.summed.practice import simulated_gradients
from dager_tutorial.server.decoder.summed.sketch import Sketch
from dager_tutorial.server.decoder.summed.spectra import Bands, bands
from dager_tutorial.server.decoder.summed.weighing import logistic, screened
from dager_tutorial.server.embedding_rows import among, named_tokens
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.token_filter import Candidates
from dager_tutorial.status import Certainty, Status
from dager_tutorial.update import Update

WIDTH = 192


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model wide enough that most of its spectrum is not rounding, and narrow enough to be filled."""
    tokenizer = word_tokenizer()
    if request.param == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            bos_token_id=1,
            eos_token_id=1,
            n_embd=WIDTH,
            n_layer=3,
            n_head=6,
            initializer_range=0.1,
        )
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=512,
            initializer_range=0.1,
        )
    return random_model(request.param, config, tokenizer)


def test_texts_come_back_beyond_the_width_and_none_is_confirmed_in_vain(
    model: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    """More prefixes than dimensions: most texts come back, and every text that the last block confirms is true."""
    texts = random_texts(22, 3, 9, 9)
    true = truth(model, texts)
    assert len({ids[:end] for ids in true for end in range(1, 10)}) > WIDTH
    found = searched(model, client_update(model, texts))
    assert found.status in {Status.SATURATED, Status.ENDS_CONFIRMED}
    assert len(found.sequences) <= len(texts)
    assert len(true & set(found.sequences)) >= 0.7 * len(texts)
    confirmed = {
        tokens
        for tokens, confirmation in zip(found.sequences, found.confirmations, strict=True)
        if confirmation.certainty is not Certainty.GUESS
    }
    assert confirmed == set(found.confirmed) <= true and len(confirmed) >= 0.7 * len(texts)
    assert all(
        {tap.block for tap in confirmation.taps} == {2}
        for confirmation in found.confirmations
        if confirmation.certainty is Certainty.WHOLE
    )


def test_peeling_drives_the_search_until_all_is_explained(
    model: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    """What one search leaves is searched again: every text beyond the width, with its label and the proof."""
    texts, labels = random_texts(22, 3, 9, 9), [place % 2 for place in range(22)]
    update, known = play(model, texts, labels)
    found = attack(model, update)
    assert found.status is Status.CERTIFIED
    assert dict(zip(found.sequences, found.labels, strict=True)) == {
        text: (label,) for text, label in zip(known.sequences, labels, strict=True)
    }


def test_evidence_alone_confirms_nothing(model: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """Without the last block's gradients texts come back all the same, and every one of them is called a guess."""
    texts = random_texts(22, 3, 9, 9)
    update = client_update(model, texts)
    found = attack(model, Update({name: each for name, each in update.gradients.items() if ".2." not in name}))
    assert found.status is Status.SATURATED
    assert len(truth(model, texts) & set(found.sequences)) >= len(texts) / 3
    assert {confirmation.certainty for confirmation in found.confirmations} == {Certainty.GUESS}
    assert not found.confirmed


# ---- the parts


TEXTS = [(7, 30, 30, 9, 12), (40, 8, 15, 3, 77), (5, 6, 7, 8, 9)]


def spectra_for(adapter: DecoderAdapter) -> dict[Tap, Bands]:
    """Spectra with any directions at all taps that are summed."""
    taps = [tap for tap in adapter.taps() if tap.block < adapter.num_blocks - 1 and (tap.block, tap.kind) != (0, QKV)]
    generator = torch.Generator().manual_seed(0)
    widths = {tap: adapter.linear_maps(tap.block, tap.kind)[0].weight.shape[not adapter.input_first] for tap in taps}
    return {tap: bands(torch.randn(2 * width, width, generator=generator)) for tap, width in widths.items()}


def passed(passage: Passage, texts: list[tuple[int, ...]]) -> tuple[Cache, Rows]:
    """The texts' prefixes without their last tokens, and their last tokens behind all blocks."""
    cache, places = passage.empty(), torch.zeros(len(texts), dtype=torch.long)
    for position in range(len(texts[0])):
        tokens = torch.tensor([text[position] for text in texts])
        rows = passage.through(passage.enter(places, tokens, position), cache, passage.halves)
        before, cache, places = cache, passage.grown(cache, rows), torch.arange(len(texts))
    return before, rows


@every("shaken_gpt2", "shaken_llama", "mistral")
@torch.no_grad()
def test_extensions_see_what_the_unmodified_network_sees(model: LanguageModel) -> None:
    adapter = adapter_for(model.network)
    assert isinstance(adapter, DecoderAdapter)
    spectra = spectra_for(adapter)
    _, rows = passed(Passage(adapter, {tap: each.log_shares for tap, each in spectra.items()}, Budget()), TEXTS)
    ids = torch.tensor(TEXTS)
    inputs = adapter.tap_inputs(ids, torch.ones_like(ids), spectra)
    seen = torch.cat([spectra[tap].log_shares(inputs[tap][:, -1]) for tap in spectra], 1)
    assert torch.allclose(rows.features().exp(), seen.exp(), rtol=1e-2, atol=1e-4)


@every("shaken_gpt2", "shaken_llama", "mistral")
@torch.no_grad()
def test_a_sketch_sees_the_weakest_bands(model: LanguageModel) -> None:
    """All but for the lengths, which it estimates: bands of one tap differ as they do in truth."""
    adapter = adapter_for(model.network)
    assert isinstance(adapter, DecoderAdapter)
    spectra, budget = spectra_for(adapter), Budget()
    passage = Passage(adapter, {tap: each.log_shares for tap, each in spectra.items()}, budget)
    cache, rows = passed(passage, TEXTS)
    attention, mlp = spectra[adapter.tap(0, ATTENTION_OUTPUT)], spectra[adapter.tap(0, MLP)]
    sketch = Sketch.of(adapter, mlp, attention, budget.generator())
    extension = FirstBlock(adapter, sketch.heads, budget).extension(4, rows.tokens)
    count = constants().screened_bands
    for place in range(len(TEXTS)):
        shares = passage.shares(extension, cache, place)
        past = cache.values[0][place, passage.seen(0, 4)]
        exact = screened(rows.features(), list(spectra))[place]
        quick = sketch.log_shares(extension, shares, past)[place]
        for part in (slice(0, count), slice(count + 1, 2 * count + 1)):
            assert torch.allclose(quick[part].diff(), exact[part].diff(), atol=0.05)


@every("tiny_gpt2", "tiny_llama")
def test_a_simulated_batch_leaves_no_trace_and_fills_the_span(model: LanguageModel) -> None:
    adapter = adapter_for(model.network)
    assert isinstance(adapter, DecoderAdapter)
    tap = adapter.tap(0, MLP)
    gradient = tap.gradient(simulated_gradients(adapter, TEXTS, [tap], torch.Generator(), ends=True))
    assert gradient is not None and torch.linalg.matrix_rank(gradient, rtol=1e-6) == sum(map(len, TEXTS))
    assert not any(each.requires_grad for each in model.network.parameters())


def test_a_rule_learns_what_tells_and_ignores_what_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    true, false = torch.randn(400, 3, generator=generator), torch.randn(300, 3, generator=generator)
    true[:, 1] -= 3
    rule = logistic(true, false)
    assert rule.factors[1] < -1 and rule.factors[[0, 2]].abs().max() < 0.3
    right = torch.cat([rule.log_odds(true) > 0, rule.log_odds(false) < 0]).float().mean()
    assert right > 0.9


@every("tiny_gpt2", "tiny_llama")
def test_a_shared_embedding_names_the_tokens_of_the_batch(
    model: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    texts = random_texts(3, 1)
    evidence = evidence_of(model, client_update(model, texts))
    named = named_tokens(evidence)
    tokens = {token for text in truth(model, texts) for token in text}
    assert named is not None and set(named.tolist()) == tokens
    kept = among(Candidates((torch.arange(20), torch.tensor([1])), every_position=False), torch.tensor([3, 4]))
    assert [each.tolist() for each in kept.tokens] == [[3, 4]]


def test_tied_embeddings_name_nothing(tiny_gpt2: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """A loss over the vocabulary gives every token a row of a tied embedding."""
    update = client_update(tiny_gpt2, random_texts(3, 1), config=ClientConfig(task="next_token"))
    assert named_tokens(evidence_of(tiny_gpt2, update)) is None
