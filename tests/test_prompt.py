"""Prompts that every text begins with: given or not, the texts are the same; a wrong one is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import every, truth

from dager_tutorial import attack, client_update
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, play_locally
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV
from dager_tutorial.models.vocabulary import beginning
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.prompt import explained
from dager_tutorial.zoo.names import load_model

PROMPT = "please tell me what you feel about this"
KINDS = ("tiny_gpt2", "tiny_llama", "tiny_bert")


def said(prompt: str, **limits: object) -> AttackConfig:
    return AttackConfig(prompt=prompt, **limits)


@every(*KINDS)
@pytest.mark.parametrize("complete", [False, True])
def test_a_prompt_given_or_not_gives_the_same_texts(
    model: LanguageModel, complete: bool, random_texts: Callable[..., list[str]]
) -> None:
    texts = [f"{PROMPT} {text}" for text in random_texts(3, 2)]
    update = client_update(model, texts)
    for prompt in ("", PROMPT, f"{PROMPT} "):
        found = attack(model, update, config=said(prompt, complete=complete))
        assert set(found.sequences) == truth(model, texts), found.diagnosis
        assert "prompt" not in found.diagnosis


@every(*KINDS)
@pytest.mark.parametrize("wrong", ["good morning to all", "please tell me what they feel about it"])
@pytest.mark.parametrize("complete", [False, True])
def test_a_wrong_prompt_is_noticed_and_costs_no_text(
    model: LanguageModel, wrong: str, complete: bool, random_texts: Callable[..., list[str]]
) -> None:
    texts = [f"{PROMPT} {text}" for text in random_texts(3, 2)]
    found = attack(model, client_update(model, texts), config=said(wrong, complete=complete))
    assert set(found.sequences) == truth(model, texts), found.diagnosis
    assert "3 of 3 texts do not begin with the prompt" in found.diagnosis


@every("tiny_gpt2", "tiny_llama")
def test_it_is_told_how_much_of_a_prompt_is_there(model: LanguageModel) -> None:
    """The oracle: of a prompt that departs from the true one at some place, as many rows are there as agree."""
    ids = model.tokenizer(f"{PROMPT} river was cold")["input_ids"]
    evidence = evidence_of(model, client_update(model, [f"{PROMPT} river was cold", f"{PROMPT} house"]))
    taps = [evidence.adapter.tap(0, QKV), evidence.adapter.tap(0, ATTENTION_OUTPUT), evidence.adapter.tap(1, QKV)]
    other = ids[1]
    for place in range(1, len(ids) - 1):
        if ids[place] != other:
            departed = [*ids[:place], other, *ids[place + 1 :]]
            assert explained(evidence, taps, departed) == place
    assert explained(evidence, taps, ids) == len(ids)


@pytest.mark.parametrize("prompt", [PROMPT, f"{PROMPT} and say why you would or would not go there"])
@pytest.mark.parametrize("training", [LocalTraining(3, 2, 1e-3), LocalTraining(10, 2, 1e-2)], ids=["gap", "ranked"])
def test_a_prompt_is_known_beside_weights_that_moved(
    prompt: str, training: LocalTraining, tiny_gpt2: LanguageModel
) -> None:
    texts = [f"{prompt} {rest}" for rest in ("river was cold", "house by the sea", "money at dinner", "children story")]
    client = ClientConfig(head_std=0.02)
    update, told = play_locally(tiny_gpt2, texts, config=client, training=training)
    found = attack(tiny_gpt2, update, config=said(prompt))
    assert set(told.sequences) == set(found.sequences), found.diagnosis


def test_the_tokens_of_a_prompt_do_not_depend_on_what_follows() -> None:
    for name in ("smollm2-135m", "minilm-l6"):
        tokenizer = load_model(name, blocks=1).tokenizer
        for prompt in ("Review:", "Review: ", "Classify the sentence", "### Text\n"):
            known = beginning(tokenizer, prompt)
            assert known
            for rest in ("an end", " 42 times", "!", "\n\n- one"):
                assert tuple(tokenizer(prompt + rest)["input_ids"][: len(known)]) == known
