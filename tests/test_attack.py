"""The whole attack on small models: every trap, every precision, every choice of what is shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import WORDS, assert_exact, every, family, truth
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import UpdateError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.status import Status
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
TASKS = ("classification", "next_token")
TINY = ("tiny_gpt2", "tiny_llama", "tiny_llama_bos")
ALL = (*TINY, "mistral", "qwen2", "smollm3", "smollm3-nope")
COMPLETE = {"classification": Status.TEXTS_COMPLETE, "next_token": Status.ROWS_COMPLETE}

pytestmark = pytest.mark.timeout(90)  # several traps make a naive search wander for ever


def recover(
    model: LanguageModel,
    texts: Sequence[str],
    task: str = "classification",
    labels: Sequence[int] | None = None,
    **options: Any,
) -> Reconstruction:
    return attack(model, client_update(model, texts, labels, config=ClientConfig(task=task, **options)))


@every(*ALL)
@pytest.mark.parametrize("task", TASKS)
def test_random_batches_are_recovered_exactly(model: LanguageModel, task: str, random_texts: Draw) -> None:
    longest = 6 if model.name == "tiny-mistral" else 9  # beyond its windows a last token's loss sees nothing
    for size, seed in [(1, 3), (2, 4), (4, 5), (4, 61)]:
        texts = random_texts(size, seed, 2, longest)
        found = recover(model, texts, task)
        assert_exact(found, truth(model, texts, task), COMPLETE[task])
        assert max(found.scores) < 10
        assert found.texts == tuple(model.tokenizer.decode(x, skip_special_tokens=True) for x in found.sequences)


TRAPS = {
    "first token repeated": ["again again again bed", "good man the dog", "see"],
    "first token repeated, long": ["again again again again again again again again bed", "good man"],
    "repeated after another": ["good again again again bed", "good again again"],
    "a text begins another": ["the dog", "the dog is good", "the", "cat"],
    "duplicates": ["the dog is good", "a cat", "the dog is good", "the dog is good"],
    "one-token texts": ["cat", "dog"],
    "one token in all": ["cat"],
    "one repeated pair": ["the dog the dog the dog", "dog the"],
    "shared beginning": ["the dog is good", "the dog is bad", "the cat is good"],
    "shared ending": ["a dog is good", "the dog is good", "is good"],
}


IMPOSSIBLE = {("one-token texts", "next_token"), ("one token in all", "next_token")}  # the loss needs two
KNOWN_TRAPS = [(trap, task) for trap in TRAPS for task in TASKS if (trap, task) not in IMPOSSIBLE]


@every(*TINY)
@pytest.mark.parametrize("trap, task", KNOWN_TRAPS)
def test_traps(model: LanguageModel, trap: str, task: str) -> None:
    texts = TRAPS[trap]
    wanted = truth(model, texts, task)
    if model.name == "tiny-llama":
        wanted = {shortest_equal(tokens) for tokens in wanted}
    assert_exact(recover(model, texts, task), wanted)


def shortest_equal(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """A text of one token repeated has, without BOS and with rotary positions, the states of that token alone."""
    return tokens[:1] if len(set(tokens)) == 1 else tokens


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "others", [[], ["again again again bed", "good man the"], ["good man the dog", "again again bed", "see"]]
)
def test_one_token_repeated_is_found_up_to_its_length(tiny_llama: LanguageModel, others: list[str], task: str) -> None:
    """No span tells [A, A] from [A]: one of them is reported, once."""
    texts = ["again again again", *others]
    found = recover(tiny_llama, texts, task)
    wanted = {shortest_equal(tokens) for tokens in truth(tiny_llama, texts, task)}
    assert sorted(map(shortest_equal, found.sequences)) == sorted(wanted)


@every(*TINY)
def test_padding_side_labels_and_heads_do_not_matter(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(3, 8)
    for options in ({"padding_side": "left"}, {"labels": [4, 0, 2]}, {"labels": [1, 1, 1]}, {"seed": 5}):
        assert_exact(recover(model, texts, **options), truth(model, texts))
    assert_exact(recover(model, texts, "next_token", padding_side="left"), truth(model, texts, "next_token"))


@every(*TINY)
def test_the_order_of_the_batch_and_the_scale_of_the_loss_do_not_matter(
    model: LanguageModel, random_texts: Draw
) -> None:
    texts = random_texts(3, 18)
    update, wanted = client_update(model, texts, [0, 1, 1]), truth(model, texts)
    assert_exact(attack(model, update), wanted)
    assert_exact(recover(model, texts[::-1], labels=[1, 1, 0]), wanted)
    for factor, kind in [(1e6, "gradient"), (1e-6, "gradient"), (-1e-3, "delta"), (-3.0, "delta")]:
        scaled = {name: tensor * factor for name, tensor in update.gradients.items()}
        assert_exact(attack(model, Update(scaled, kind=kind)), wanted)


@every(*TINY)
def test_any_part_of_the_early_blocks_is_enough(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(3, 8)
    wanted, whole = truth(model, texts), client_update(model, texts).gradients
    assert_exact(recover(model, texts, share="attention"), wanted, Status.TEXTS_COMPLETE)
    maps = ("c_attn", "q_proj", "k_proj", "v_proj")
    for chosen in (
        [name for name in whole if ".0." in name or ".1." in name],
        [name for name in whole if any(part in name for part in maps)],
        [name for name in whole if any(part in name for part in maps) and (".0." in name or ".1." in name)],
        [name for name in whole if name.endswith("weight") and ".0." in name],
    ):
        found = recover(model, texts, share=chosen)
        assert_exact(found, wanted)
        assert 0 < found.n_parameters_used <= sum(whole[name].numel() for name in chosen)
        # Queries alone do not tell whether a first token is a text: a softmax over one key has no gradient.
        assert found.status is Status.ROWS_COMPLETE


@every(*TINY, "qwen2")
def test_a_long_text(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(1, 8, 55, 55)
    assert_exact(recover(model, texts), truth(model, texts))


def plain_update(
    model: LanguageModel,
    client_class: type[PreTrainedModel],
    texts: list[str],
    side: str,
    *,
    prefix: bool = True,
) -> Update:
    """Gradients as anyone's transformers code makes them: no position ids, three classes, its own head."""
    tokenizer, config = copy.deepcopy(model.tokenizer), copy.deepcopy(model.network.config)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 3
    client = client_class(config).eval()
    base = client.base_model_prefix
    getattr(client, base).load_state_dict(model.network.state_dict())
    encoded = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    if hasattr(client, "score"):
        labels = torch.arange(len(texts)) % 3
    client(**encoded, labels=labels).loss.backward()
    gradients = {n: p.grad for n, p in client.named_parameters() if p.grad is not None}
    return Update(gradients if prefix else {n.removeprefix(f"{base}."): g for n, g in gradients.items()})


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    "name, client, task",
    [
        ("tiny_gpt2", GPT2ForSequenceClassification, "classification"),
        ("tiny_gpt2", GPT2LMHeadModel, "next_token"),
        ("tiny_llama", LlamaForSequenceClassification, "classification"),
        ("tiny_llama", LlamaForCausalLM, "next_token"),
    ],
)
def test_gradients_of_plain_transformers_code(
    name: str,
    client: type[PreTrainedModel],
    task: str,
    prefix: bool,
    request: pytest.FixtureRequest,
    random_texts: Draw,
) -> None:
    model = request.getfixturevalue(name)
    texts = random_texts(3, 2)
    update = plain_update(model, client, texts, "right", prefix=prefix)
    if not prefix:
        update = Update({n: g for n, g in update.gradients.items() if n not in {"score.weight", "lm_head.weight"}})
    assert_exact(attack(model, update), truth(model, texts, task))


def test_texts_that_begin_late_behind_left_padding(tiny_gpt2: LanguageModel, random_texts: Draw) -> None:
    """Plain transformers code counts positions from the first pad."""
    far = ["a cat", " ".join(WORDS[40:80])]
    for texts in (random_texts(3, 0), random_texts(3, 2), far, ["the dog is good", "the dog"]):
        update = plain_update(tiny_gpt2, GPT2ForSequenceClassification, texts, "left")
        assert_exact(attack(tiny_gpt2, update), truth(tiny_gpt2, texts))
    update = plain_update(tiny_gpt2, GPT2LMHeadModel, far, "left")
    assert_exact(attack(tiny_gpt2, update), truth(tiny_gpt2, far, "next_token"))


@every("mistral", "qwen2", "smollm3", "smollm3-nope")
def test_repeats_and_windows_in_the_llama_family(model: LanguageModel) -> None:
    texts = ["again again again bed", "good man the dog", "see"]
    assert_exact(recover(model, texts), truth(model, texts))
    wanted = {shortest_equal(tokens) for tokens in truth(model, texts, "next_token")}
    assert_exact(recover(model, texts, "next_token"), wanted)


def test_text_beyond_the_sliding_window(random_texts: Draw) -> None:
    model, texts = family("mistral"), random_texts(2, 7, 20, 24)
    assert_exact(recover(model, texts, "next_token"), truth(model, texts, "next_token"))


def test_results_do_not_depend_on_seed_or_memory(tiny_gpt2: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(4, 33)
    update = client_update(tiny_gpt2, texts)
    calls: list[tuple[str, int, int | None]] = []
    configs = (AttackConfig(), AttackConfig(seed=9), AttackConfig(memory_mb=16))
    runs = [attack(tiny_gpt2, update, config=each, progress=lambda *call: calls.append(call)) for each in configs]
    for found in runs:
        assert_exact(found, truth(tiny_gpt2, texts))
        assert found.sequences == runs[0].sequences and found.scores == pytest.approx(runs[0].scores, rel=1e-3)
    assert set(runs[0].seconds) == {"subspace", "filter", "search", "completion", "total"}
    assert {tap.kind: rank for tap, rank in runs[0].ranks.items() if tap.block == 0}[QKV] > 0
    assert {stage for stage, *_ in calls} == {"filter", "search"}


def test_mistakes_are_told(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel) -> None:
    update = client_update(tiny_gpt2, ["a cat"])
    with pytest.raises(UpdateError):
        attack(tiny_llama, update)
    with pytest.raises(UpdateError, match="shape"):
        attack(tiny_gpt2, Update({"h.0.attn.c_attn.weight": torch.ones(8, 24)}))
