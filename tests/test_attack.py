"""The whole attack on small models: every trap, every precision, every choice of what is shared."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import WORDS
from test_models import family
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from dager_tutorial.server.attack import AttackConfig, attack
from dager_tutorial.client.step import client_update, encode
from dager_tutorial.errors import DagerError, UpdateError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
Sequences = set[tuple[int, ...]]
TINY = ["tiny_gpt2", "tiny_llama", "tiny_llama_bos"]
ALL = [*TINY, "mistral", "qwen2", "smollm3", "smollm3-nope"]


@pytest.fixture(autouse=True)
def _endless_searches_fail() -> Iterator[None]:
    """Several traps make a naive search wander for ever: let that fail a test, and not stop all others."""

    def give_up(*_: object) -> None:
        raise TimeoutError("the search does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param) if request.param.startswith("tiny_") else family(request.param)


def every(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", names, indirect=True)


def truth(model: LanguageModel, texts: Sequence[str], task: str = "classification") -> Sequences:
    """What can be recovered: the distinct texts; for the next-token loss without their last token, which is only a
    target, and without those that begin another, whose end leaves no trace."""
    ids = [tuple(tokens) for tokens in encode(model.tokenizer, texts)]
    if task == "classification":
        return set(ids)
    inputs = {tokens[:-1] for tokens in ids if len(tokens) > 1}
    return {one for one in inputs if not any(one == other[: len(one)] for other in inputs - {one})}


def assert_exact(found: Reconstruction, wanted: Sequences) -> None:
    assert sorted(found.sequences) == sorted(wanted)
    assert found.status == "exact", found.diagnosis


def recover(model: LanguageModel, texts: Sequence[str], task: str = "classification", **options) -> Reconstruction:
    return attack(model, client_update(model, texts, task=task, **options))


@every(ALL)
@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_random_batches_are_recovered_exactly(model: LanguageModel, task: str, random_texts: Draw) -> None:
    longest = 6 if model.name == "tiny-mistral" else 9  # beyond its windows a last token's loss sees nothing
    for size, seed in [(1, 3), (2, 4), (4, 5), (4, 61)]:
        texts = random_texts(size, seed, 2, longest)
        found = recover(model, texts, task)
        assert_exact(found, truth(model, texts, task))
        assert max(found.scores) < 10
        assert set(found.texts) == {model.tokenizer.decode(x, skip_special_tokens=True) for x in found.sequences}


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


@every(TINY)
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_traps(model: LanguageModel, trap: str, task: str) -> None:
    texts = TRAPS[trap]
    if task == "next_token" and max(map(len, encode(model.tokenizer, texts))) < 2:
        pytest.skip("a next-token loss needs two tokens")
    wanted = truth(model, texts, task)
    if model.name == "tiny-llama":
        wanted = {shortest_equal(tokens) for tokens in wanted}
    assert_exact(recover(model, texts, task), wanted)


def shortest_equal(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """A text of one token repeated has, without BOS and with rotary positions, the states of that token alone."""
    return tokens[:1] if len(set(tokens)) == 1 else tokens


@pytest.mark.parametrize("task", ["classification", "next_token"])
@pytest.mark.parametrize(
    "others", [[], ["again again again bed", "good man the"], ["good man the dog", "again again bed", "see"]]
)
def test_one_token_repeated_is_found_up_to_its_length(tiny_llama: LanguageModel, others: list[str], task: str) -> None:
    """No span tells [A, A] from [A]: one of them is reported, once."""
    texts = ["again again again", *others]
    found = recover(tiny_llama, texts, task)
    wanted = {shortest_equal(tokens) for tokens in truth(tiny_llama, texts, task)}
    assert sorted(map(shortest_equal, found.sequences)) == sorted(wanted)


@every(TINY)
def test_padding_side_labels_and_heads_do_not_matter(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(3, 8)
    for options in ({"padding_side": "left"}, {"labels": [4, 0, 2]}, {"labels": [1, 1, 1]}, {"seed": 5}):
        assert_exact(recover(model, texts, **options), truth(model, texts))
    assert_exact(recover(model, texts, "next_token", padding_side="left"), truth(model, texts, "next_token"))


@every(TINY)
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


@every(TINY)
def test_any_part_of_the_early_blocks_is_enough(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(3, 8)
    wanted, names = truth(model, texts), list(client_update(model, texts).gradients)
    assert_exact(recover(model, texts, share="attention"), wanted)
    maps = ("c_attn", "q_proj", "k_proj", "v_proj")
    for chosen in (
        [name for name in names if ".0." in name or ".1." in name],
        [name for name in names if any(part in name for part in maps)],
        [name for name in names if any(part in name for part in maps) and (".0." in name or ".1." in name)],
        [name for name in names if name.endswith("weight") and ".0." in name],
    ):
        found = recover(model, texts, share=chosen)
        assert_exact(found, wanted)
        assert found.n_parameters_used <= sum(client_update(model, texts).gradients[name].numel() for name in chosen)


@every(TINY)
def test_an_uninformative_update_has_no_signal(model: LanguageModel, random_texts: Draw) -> None:
    update = client_update(model, random_texts(3, 8))
    later = {name: tensor for name, tensor in update.gradients.items() if ".0." not in name}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in update.gradients.items()}
    for gradients in (later, zeros, {**later, **{name: x for name, x in zeros.items() if ".0." in name}}):
        found = attack(model, Update(gradients))
        assert (found.status, found.sequences) == ("no_signal", ())
        assert found.diagnosis


@every(TINY)
def test_noise_alone_is_no_text(model: LanguageModel, random_texts: Draw) -> None:
    generator = torch.Generator().manual_seed(0)
    update = client_update(model, random_texts(1, 8)).gradients
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in update.items()}
    found = attack(model, Update(noise), config=AttackConfig(time_budget=20))
    assert found.status in {"no_signal", "no_candidates", "saturated"}


@every(TINY)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions(model: LanguageModel, dtype: str, random_texts: Draw) -> None:
    for size, seed in [(1, 7), (2, 9), (3, 12)]:
        texts = random_texts(size, seed)
        found = recover(model, texts, dtype=dtype)
        if dtype == "float64" or found.status == "exact":
            assert_exact(found, truth(model, texts))
        else:
            assert size > 1 and found.status == "partial" and found.diagnosis
            assert set(found.sequences) & truth(model, texts)


@every([*TINY, "qwen2"])
def test_a_long_text(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(1, 8, 55, 55)
    assert_exact(recover(model, texts), truth(model, texts))


@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_512_tokens(task: str) -> None:
    """All where each carries a loss; where only the last one does, the early ones' gradients drown in rounding."""
    model, chance = family("llama", 576, 2), random.Random(4)
    text = " ".join(chance.choices(WORDS[::27], k=512))
    found = attack(model, client_update(model, [text], task=task), config=AttackConfig(time_budget=60))
    if task == "next_token":
        assert_exact(found, truth(model, [text], task))
    else:
        assert found.status in {"partial", "saturated"}
        assert len(found.sequences) <= 20


@every(TINY)
@pytest.mark.parametrize("size, length", [(1, 90), (16, 8), (30, 9)])
def test_more_tokens_than_the_model_is_wide_is_saturated(
    model: LanguageModel, size: int, length: int, random_texts: Draw
) -> None:
    texts = random_texts(size, 8, length, length)
    found = attack(model, client_update(model, texts), config=AttackConfig(time_budget=10))
    assert found.status == "saturated"
    assert len(found.sequences) <= 20 * size


@every(["tiny_llama_bos", "tiny_llama", "tiny_gpt2"])
def test_a_token_repeated_many_times_ends(model: LanguageModel) -> None:
    """States of a long repeat are almost equal: the search must not wander among them."""
    text = "again " * 12 + "bed"
    found = attack(model, client_update(model, [text]), config=AttackConfig(time_budget=20))
    assert truth(model, [text]) <= set(found.sequences) or found.status == "partial"
    assert len(found.sequences) < 10


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
    found = attack(tiny_gpt2, update)
    assert truth(tiny_gpt2, far, "next_token") <= set(found.sequences)


@every(["mistral", "qwen2", "smollm3", "smollm3-nope"])
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
    runs = [
        attack(tiny_gpt2, update, config=config, progress=lambda *call: calls.append(call))
        for config in (AttackConfig(), AttackConfig(seed=9), AttackConfig(memory_mb=16))
    ]
    for found in runs:
        assert_exact(found, truth(tiny_gpt2, texts))
    assert set(runs[0].seconds) == {"subspace", "filter", "search", "total"}
    assert runs[0].ranks["block 0 query, key, value"] > 0
    assert {stage for stage, *_ in calls} == {"filter", "search"}


def test_mistakes_are_told(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel) -> None:
    update = client_update(tiny_gpt2, ["a cat"])
    with pytest.raises(UpdateError):
        attack(tiny_llama, update)
    with pytest.raises(UpdateError, match="shape"):
        attack(tiny_gpt2, Update({"h.0.attn.c_attn.weight": torch.ones(8, 24)}))
    for wrong in ({"time_budget": 0}, {"time_budget": float("nan")}, {"memory_mb": 1}):
        with pytest.raises(DagerError, match=next(iter(wrong))):
            replace(AttackConfig(), **wrong)
