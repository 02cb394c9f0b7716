"""Fixtures of tiny random models, one of every architecture, and the checks of annotations that hold in all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, here and in the kernels that run the notebooks: one thread, as where notebooks are made.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

import pytest
from jaxtyping import install_import_hook

# Before anything of these packages is imported: under pytest every annotation is checked, shapes included.
_CHECKED = ("baselines", "challenges", "client", "evaluation", "frameworks", "models", "server", "textbook")
install_import_hook([f"dager_tutorial.{name}" for name in _CHECKED], "shape_checks.checked")
pytest.register_assert_rewrite("helpers")

from helpers import WORDS, family, random_model, shaken, word_tokenizer
from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, RobertaConfig

from dager_tutorial.models.language_model import LanguageModel


def pytest_configure(config: pytest.Config) -> None:
    """What the outputs of notebooks may differ in, wherever pytest is started."""
    config.option.nbval_sanitize_with = str(Path(__file__).with_name("nbval_sanitize.cfg"))


_SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "initializer_range": 0.1}


@pytest.fixture(scope="session")
def tiny_gpt2() -> LanguageModel:
    """GPT-2: learned absolute positions, Conv1D maps with biases, no BOS, no pad token."""
    tokenizer = word_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, eos_token_id=1, bos_token_id=1, **_SHAPE)
    return random_model("tiny-gpt2", config, tokenizer)


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Grouped queries (two keys for four queries), rotary positions, tied embeddings as in small Llamas."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=600,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=tokenizer.bos_token_id,
        **_SHAPE,
    )


@pytest.fixture(scope="session")
def tiny_llama() -> LanguageModel:
    """Llama: rotary positions, grouped-query attention, no biases, tied embeddings, a tokenizer without
    BOS."""
    tokenizer = word_tokenizer()
    return random_model("tiny-llama", _llama_config(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_llama_bos() -> LanguageModel:
    """The same architecture with a tokenizer that puts a BOS token in front of every text."""
    tokenizer = word_tokenizer("bos")
    return random_model("tiny-llama-bos", _llama_config(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_bert() -> LanguageModel:
    """BERT: bidirectional, learned positions, token types, a pooler, [CLS] and [SEP], a pad token."""
    tokenizer = word_tokenizer("cls")
    sizes = {"intermediate_size": 160, "max_position_embeddings": 128}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, **_SHAPE)
    return random_model("tiny-bert", config, tokenizer)


@pytest.fixture(scope="session")
def tiny_masked_bert() -> LanguageModel:
    """The same architecture with a tokenizer that has a mask token."""
    tokenizer = word_tokenizer("mask")
    sizes = {"intermediate_size": 160, "max_position_embeddings": 128}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, **_SHAPE)
    return random_model("tiny-masked-bert", config, tokenizer)


@pytest.fixture(scope="session")
def tiny_distilbert() -> LanguageModel:
    """DistilBERT: no token types, no pooler, a mask token."""
    tokenizer = word_tokenizer("mask")
    sizes = {"hidden_dim": 160, "max_position_embeddings": 128}
    config = DistilBertConfig(vocab_size=len(tokenizer), **sizes, **_SHAPE)
    return random_model("tiny-distilbert", config, tokenizer)


@pytest.fixture(scope="session")
def tiny_roberta() -> LanguageModel:
    """RoBERTa: positions from 2 on, <s> and </s>, a mask token."""
    tokenizer = word_tokenizer("s")
    sizes = {"intermediate_size": 160, "max_position_embeddings": 130, "type_vocab_size": 1}
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **_SHAPE)
    return random_model("tiny-roberta", config, tokenizer)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """The model that `helpers.every` names."""
    kind, _, width = request.param.partition("@")
    if kind.startswith("tiny_"):
        return request.getfixturevalue(kind)
    if kind.startswith("shaken_"):
        return shaken(request.getfixturevalue(kind.replace("shaken_", "tiny_")))
    return family(kind, int(width)) if width else family(kind)


@pytest.fixture(scope="session")
def random_texts() -> Callable[..., list[str]]:
    """A function that draws texts of random words: ``random_texts(count, seed, shortest=3, longest=9)``."""

    def draw(count: int, seed: int, shortest: int = 3, longest: int = 9) -> list[str]:
        chance = random.Random(seed)
        return [" ".join(chance.choices(WORDS, k=chance.randint(shortest, longest))) for _ in range(count)]

    return draw
