"""What a client may be asked: every constraint holds at its edges, and every mistake is named in one line."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import fields, replace

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.constraints import OneOf, Within
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.models.language_model import LanguageModel

TEXTS = ["the dog is good", "a cat", "we want more bread and milk today", "no"]
OPTIONS = {each.name: each.metadata["constraint"] for each in fields(ClientConfig)}
WORDS = {name: constraint for name, constraint in OPTIONS.items() if isinstance(constraint, OneOf)}
NUMBERS = {name: constraint for name, constraint in OPTIONS.items() if isinstance(constraint, Within)}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package itself meet arguments of wrong types, as it does outside of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def refuses(option: str, value: object) -> None:
    """The value is refused by one line that names the option, shows the value and says what to give."""
    with pytest.raises(DagerError) as caught:
        ClientConfig(**{option: value})
    shown = str(value) if isinstance(value, (int, float)) else quote(value)
    assert re.fullmatch(f"{option} is {re.escape(shown)}: (choose|give) .+", str(caught.value))


def test_every_option_says_what_it_is_for_and_what_it_may_be() -> None:
    assert set(WORDS) | set(NUMBERS) == set(OPTIONS)
    assert all(each.metadata["help"].endswith(".") for each in fields(ClientConfig))


@pytest.mark.parametrize("option", WORDS)
@given(st.one_of(st.text(), st.sampled_from(["ALL", "float", "Right", "classification "])))
def test_only_the_words_that_are_declared_are_taken(option: str, other: str) -> None:
    choices = WORDS[option].choices
    assert [getattr(ClientConfig(**{option: word}), option) for word in choices] == list(choices)
    if other not in choices:
        refuses(option, other)


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.usefixtures("unchecked")
def test_numbers_are_taken_to_both_ends_of_their_range_and_not_beyond(option: str) -> None:
    constraint = NUMBERS[option]
    low, high = constraint.low, constraint.high
    assert [getattr(ClientConfig(**{option: edge}), option) for edge in (low, high)] == [low, high]
    beyond = [low - 1, high + 1] if constraint.whole else [math.nextafter(low, -math.inf), math.inf, 0.5 + low - 1]
    for value in (*beyond, math.nan, "3", [3], *([low + 0.5] if constraint.whole else [])):
        refuses(option, value)
    if constraint.optional:
        assert getattr(ClientConfig(**{option: None}), option) is None
    else:
        refuses(option, None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [[], (), ["score.weight", 3], None, 3, {"score.weight"}], ids=str)
def test_what_is_shared_are_words_or_names(value: object) -> None:
    with pytest.raises(DagerError, match=r"^share is .+: choose all, attention, or a list of parameter names$"):
        ClientConfig(share=value)


def test_a_list_of_names_is_frozen() -> None:
    names = ["b", "a"]
    config = ClientConfig(share=names)
    names.append("c")
    assert config.share == ("b", "a") and hash(config) == hash(ClientConfig(share=("b", "a")))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="batch_size"):
        ClientConfig(batch_size=3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "texts", "options", "message"),
    [
        ("tiny_gpt2", [], {}, "the batch is empty"),
        ("tiny_gpt2", "the dog", {}, "list of strings"),
        ("tiny_gpt2", ["dog", None], {}, "list of strings"),
        ("tiny_gpt2", ["dog", ""], {}, "text 1 ('') has no tokens"),
        ("tiny_bert", ["dog", "  "], {}, "text 1 ('  ') has no tokens"),
        ("tiny_llama_bos", [""], {}, "text 0 ('') has no tokens"),
        (
            "tiny_gpt2",
            ["cat", "dog " * 129],
            {},
            "text 1 has 129 tokens and the model 128 positions: max_length=128",
        ),
        ("tiny_roberta", ["cat", "dog " * 127], {}, "text 1 has 129 tokens and the model 128 positions"),
        ("tiny_gpt2", TEXTS, {"labels": [0, 1]}, "2 labels for 4 texts"),
        ("tiny_gpt2", TEXTS, {"labels": [0, 1, -1, 0]}, "label -1 is negative"),
        ("tiny_gpt2", TEXTS, {"labels": [0, 1, 0.5, 0]}, "labels must be integers"),
        ("tiny_gpt2", TEXTS, {"share": ["h.9.x"]}, "share names 'h.9.x'"),
        ("tiny_gpt2", TEXTS, {"share": ["score.weight"], "loss": "frobenius"}, "the loss depends on no parameter"),
        ("tiny_bert", TEXTS, {"max_length": 2}, "must exceed the 2 special tokens"),
        ("tiny_gpt2", ["dog", "cat"], {"task": "next_token"}, "at least two tokens"),
        ("tiny_bert", TEXTS, {"task": "next_token"}, "needs a causal model and bert is not"),
        ("tiny_roberta", TEXTS, {"task": "next_token"}, "roberta is not: use task 'masked'"),
        ("tiny_bert", TEXTS, {"padding_side": "left"}, "needs a causal model"),
        ("tiny_gpt2", TEXTS, {"task": "masked"}, "needs a bidirectional model and gpt2 is causal: use task 'next_"),
        ("tiny_bert", TEXTS, {"task": "masked"}, "needs a mask token and the tokenizer has none"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    name: str, texts, options: dict, message: str, request: pytest.FixtureRequest
) -> None:
    model, labels = request.getfixturevalue(name), options.pop("labels", None)
    with pytest.raises(DagerError) as caught:
        client_update(model, texts, labels, config=ClientConfig(**options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_a_foreign_tokenizer_is_named(tiny_gpt2: LanguageModel) -> None:
    network = copy.deepcopy(tiny_gpt2.network)
    network.resize_token_embeddings(300)
    with pytest.raises(DagerError, match="vocabulary 300 rows: tokenizer and model do not belong together"):
        client_update(replace(tiny_gpt2, network=network), ["young you"])


def scaled(model: LanguageModel, factor: float) -> LanguageModel:
    """The model with the gain of its last norm multiplied."""
    network = copy.deepcopy(model.network)
    gain: nn.Parameter = network.ln_f.weight
    gain.data *= factor
    return replace(model, network=network)


@pytest.mark.parametrize(
    ("dtype", "factor", "advice"),
    [
        ("float16", 1e4, "overflows: train with bfloat16 or float32 or float64"),
        ("float32", 1e30, "overflows: train with float64"),
        ("float32", math.nan, "is not finite, as the model's 'ln_f.weight' is not: load other weights"),
    ],
)
def test_where_a_gradient_is_not_finite_the_cause_is_named(
    tiny_gpt2: LanguageModel, dtype: str, factor: float, advice: str
) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    config = ClientConfig(loss="frobenius", dtype=dtype, share=(name,))
    with pytest.raises(DagerError) as caught:
        client_update(scaled(tiny_gpt2, factor), TEXTS, config=config)
    assert str(caught.value) == f"in dtype {dtype!r} the gradient of {name!r} {advice}"


def test_another_cause_speaks_for_itself(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(UpdateError, match=r"^model is 'two\\nlines': a name may not have control characters$"):
        client_update(replace(tiny_gpt2, name="two\nlines"), TEXTS)
