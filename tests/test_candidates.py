"""Which tokens come into question: a vocabulary cut to what is named or possible never loses a true token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import every, searched, truth

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update, play
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.models.vocabulary import can_be_in_texts
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.candidates import candidates_of
from dager_tutorial.server.embedding_rows import named_positions, named_tokens
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.update import Update
from dager_tutorial.zoo.names import load_model

ALL_KINDS = ("tiny_gpt2", "tiny_llama", "tiny_bert", "xlm-roberta")


@every(*ALL_KINDS)
def test_names_are_the_batch_s_tokens_and_length_and_change_nothing_else(
    model: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    """A relation of two runs: the embeddings' gradient narrows the candidates, and the texts stay what they were."""
    texts = random_texts(4, 2)
    update, told = play(model, texts)
    evidence = evidence_of(model, update)
    named, length = named_tokens(evidence), named_positions(evidence)
    silent = {model.network.get_input_embeddings().padding_idx} - {None}
    assert named is not None and set(named.tolist()) == {token for ids in told.sequences for token in ids} | silent
    assert length in (None, max(map(len, told.sequences)))
    assert (length is None) == (evidence.adapter.first_input.positions is None)
    without = Update({name: each for name, each in update.gradients.items() if "embed" not in name and "wte" not in name
                      and "wpe" not in name})  # fmt: skip
    assert named_tokens(evidence_of(model, without)) is None
    one, other = searched(model, update), searched(model, without)
    assert set(one.sequences) == set(other.sequences) == truth(model, texts)


@every(*ALL_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_true_token_is_cut_off(model: LanguageModel, dtype: str, random_texts: Callable[..., list[str]]) -> None:
    """Pads, unknown words and small numbers that become zero included, every true pair comes into question."""
    tokenizer = model.tokenizer
    texts = [*random_texts(4, 2), f"the {tokenizer.unk_token} zzyzx {tokenizer.pad_token or ''} {tokenizer.eos_token}"]
    config = ClientConfig(dtype=dtype, head_std=1e-6 if dtype == "float16" else 0.1)
    update, told = play(model, texts, config=config)
    evidence = evidence_of(model, update)
    first = evidence.span(evidence.adapter.tap(0, QKV))
    assert first is not None
    named = named_tokens(evidence)
    for ids in told.sequences:
        assert bool(can_be_in_texts(tokenizer, torch.tensor(ids)).all())
        assert named is None or set(ids) <= set(named.tolist())
    if dtype == "float32":
        found = candidates_of(evidence, first, Budget())
        for ids in told.sequences:
            assert all(token in found.at(place).tolist() for place, token in enumerate(ids))


def test_an_output_map_names_nothing_and_noise_hides_no_names(tiny_gpt2: LanguageModel) -> None:
    texts = ["the river was cold", "my sister sold her house"]
    tied = client_update(tiny_gpt2, texts, config=ClientConfig(task="next_token"))
    assert named_tokens(evidence_of(tiny_gpt2, tied)) is None
    clean, draw = client_update(tiny_gpt2, texts), torch.Generator().manual_seed(0)
    noisy = {name: each + 1e-5 * torch.randn(each.shape, generator=draw) for name, each in clean.gradients.items()}
    for named in (named_tokens, named_positions):
        seen, told = (named(evidence_of(tiny_gpt2, each)) for each in (Update(noisy), clean))
        assert torch.equal(torch.as_tensor(seen), torch.as_tensor(told))


def test_entries_that_no_text_has_are_told_on_real_vocabularies() -> None:
    minilm = load_model("minilm-l6", blocks=1).tokenizer
    names = ["[PAD]", "[UNK]", "[MASK]", "[unused12]", "...", ".", "house", "##s", "##é"]
    ids = torch.tensor(minilm.convert_tokens_to_ids(names))
    impossible = [
        name for name, possible in zip(names, can_be_in_texts(minilm, ids).tolist(), strict=True) if not possible
    ]
    assert impossible == ["[unused12]", "..."]
    gpt2 = load_model("random:gpt2", blocks=1)
    rows = torch.arange(gpt2.network.get_input_embeddings().num_embeddings)
    assert can_be_in_texts(gpt2.tokenizer, rows).nonzero()[:, 0].tolist() == list(range(len(gpt2.tokenizer)))
