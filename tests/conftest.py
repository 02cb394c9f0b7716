"""Tiny random models for fast tests: every architecture family, an offline word-level tokenizer."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, here and in the kernels that run the notebooks: few threads, no progress bars.
for _name, _value in {
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from dager_tutorial.models.language_model import LanguageModel

WORDS = """
a about above across action actor after again age ago air all almost alone along also always among and angry
animal another answer any apple are arm around art as ask at away baby back bad bag ball bank be bear
beautiful because bed been before began behind believe best better between big bird black blood blue board
boat body bone book both bottle box boy bread break breakfast bridge bright bring brother brown build burn bus
business busy but buy by cake call came camera can car care carry case cat catch chair chance change cheap
cheese child church city class clean clear clever climb clock close cloud coat coffee cold come company cook
cool corn corner could country course cousin cover cow cross cry cup cut dance danger dark daughter day dead
dear decide deep desk did die different dinner dirty do doctor dog door down draw dream dress drink drive drop
dry during each ear early earth east easy eat edge egg empty end enough evening every eye face fact fall
family far farm fast father fear feel few field fight film find finger fire first fish floor flower fly follow
food foot for forest forget found free fresh friend from front fruit full funny game garden gave girl give
glad glass go gold good grass great green grey ground grow had hair half hand happy hard has hat have he head
hear heart heavy help her here high hill him his hold hole holiday home hope horse hospital hot hotel hour
house how hundred hungry husband ice idea if ill in inside into iron is island it job join jump just keep key
kind king kitchen knee knew know lady lake land large last late laugh lead leaf learn leave left leg less
letter life light like line lion lip listen little live long look lose loud love low lunch make man many map
mark market may me meal meat meet milk mind minute mirror money month moon more morning most mother mountain
mouth move music must my name near neck need never new news night no noise north nose not nothing now number
of off office often oil old on once one only open or orange other our out over page paint paper park part pass
pay pen people picture place plan play please pocket point poor quick quiet rain read red rest rice rich ride
right ring river road rock room round run sad said salt same sand school sea see she ship shirt shoe shop
short show sing sister sit sleep slow small smile snow so some song soon south stand star stay stone stop
story street strong sugar sun table take talk tall tea tell that the their then there they thing think this
tired to today together too town train tree true try under until up us very voice wait walk wall want warm was
watch water we week well went were west what when where white who why wife wind window winter with woman wood
word work world write year yes you young
""".split()  # noqa: SIM905
"""The ordinary words that the tiny tokenizers know, each one token."""


def pytest_configure(config: pytest.Config) -> None:
    """What the outputs of notebooks may differ in, wherever pytest is started."""
    config.option.nbval_sanitize_with = str(Path(__file__).with_name("nbval_sanitize.cfg"))


_SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "initializer_range": 0.1}


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, lower-casing.

    Args:
        template: None for the way of GPT-2 (nothing added, no pad token), ``"bos"`` for Llama's (one token in
            front, no pad token), ``"cls"`` for BERT's (one in front, one behind, a pad token), ``"mask"`` for
            BERT's with a mask token, or ``"s"`` for RoBERTa's (likewise, the pad token's id is 1).
    """
    special = {
        None: {"unk_token": "<unk>", "eos_token": "<eos>"},
        "bos": {"unk_token": "<unk>", "eos_token": "<eos>", "bos_token": "<bos>"},
        "cls": {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "mask": {
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "s": {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
    }[template]
    ids = {word: index for index, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    framed = {"cls": "[CLS] $A [SEP]", "mask": "[CLS] $A [SEP]", "s": "<s> $A </s>"}
    single = ({None: None, "bos": "<bos> $A"} | framed)[template]
    if single:
        added = [(token, ids[token]) for token in special.values() if token in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def random_model(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A model of seeded random weights.

    Args:
        name: Its name.
        config: Its configuration; the vocabulary size is the tokenizer's.
        tokenizer: Its tokenizer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModel.from_config(config).eval().requires_grad_(False)
    return LanguageModel(name, network, tokenizer)


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


@pytest.fixture(scope="session")
def random_texts() -> Callable[..., list[str]]:
    """A function that draws texts of random words: ``random_texts(count, seed, shortest=3, longest=9)``."""

    def draw(count: int, seed: int, shortest: int = 3, longest: int = 9) -> list[str]:
        chance = random.Random(seed)
        return [" ".join(chance.choices(WORDS, k=chance.randint(shortest, longest))) for _ in range(count)]

    return draw
