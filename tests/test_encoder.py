"""The encoder attack on small models: every family and loss, what must not matter, and what it cannot tell."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import WORDS, assert_exact, every, searched, truth
from torch import Tensor

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.budget import AttackConfig, Budget
from dager_tutorial.server.encoder.run import recover_texts
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.unmixing import Incidence, Marginals
from dager_tutorial.status import Certainty, Status
from dager_tutorial.textbook.encoder import textbook_encoder_attack
from dager_tutorial.update import Update
from dager_tutorial.zoo.names import load_model

Draw = Callable[..., list[str]]
FAMILIES = ("tiny_bert", "tiny_masked_bert", "tiny_distilbert", "tiny_roberta")
MASKING = ("tiny_masked_bert", "tiny_distilbert", "tiny_roberta")
BATCHES = ((1, 0), (2, 1), (3, 2), (4, 3))
# What each part of the search stands and falls with.
ENTRANCES = {
    "incidence": "dager_tutorial.server.encoder.run.unmix",
    "relaxation": "dager_tutorial.server.encoder.relaxation.relax",
    "polish": "dager_tutorial.server.encoder.polish.Polish.polished",
}


def only(update: Update, *parts: str) -> Update:
    """The gradients whose names hold one of these parts."""
    kept = {name: tensor for name, tensor in update.gradients.items() if any(part in name for part in parts)}
    return replace(update, gradients=kept)


@pytest.mark.parametrize(
    ("model", "task"),
    [(name, "classification") for name in FAMILIES] + [(name, "masked") for name in MASKING],
    indirect=["model"],
)
def test_batches_are_exact(model: LanguageModel, task: str, random_texts: Draw) -> None:
    """Batches of 1 to 4 texts that share words, under both losses; 64 dimensions hold about 30 rows."""
    for size, seed in BATCHES:
        texts = random_texts(size, seed, 2, 7)
        found = searched(model, client_update(model, texts, config=ClientConfig(task=task)))
        assert_exact(found, truth(model, texts, task), Status.TEXTS_COMPLETE)
        assert max(found.scores) < 10


@every("tiny_masked_bert")
def test_masks_and_unknown_words_are_seen_in_the_texts(model: LanguageModel) -> None:
    found = searched(model, client_update(model, ["the cat zzyzx the dog"]))
    unknown = model.tokenizer.unk_token
    assert found.texts == (f"the cat {unknown} the dog",)
    found = searched(model, client_update(model, ["the cat saw the dog"], config=ClientConfig(task="masked")))
    assert model.tokenizer.mask_token in found.texts[0]
    assert not any(frame in found.texts[0] for frame in (model.tokenizer.cls_token, model.tokenizer.sep_token))


@every("tiny_bert")
def test_words_that_repeat_within_and_between_texts(model: LanguageModel) -> None:
    """Words that stand several times, in one text or in all, at one position or at many."""
    texts = ["the cat and the dog and the bird", "the dog saw the big cat", "a cat saw the dog", "saw the the the cat"]
    assert_exact(searched(model, client_update(model, texts)), truth(model, texts))


@every("tiny_bert", "tiny_distilbert")
def test_a_text_that_begins_another_and_one_that_ends_it(model: LanguageModel) -> None:
    """No prefix tree here: beginnings and ends of other texts are texts of their own."""
    texts = ["the old house by the river", "the old house", "by the river"]
    assert_exact(searched(model, client_update(model, texts)), truth(model, texts))


@every("tiny_bert")
def test_what_does_not_change_the_answer(model: LanguageModel, random_texts: Draw) -> None:
    """Order and labels of the batch, a text given twice, the loss' scale, the sharing of more, and running it again."""
    texts = random_texts(3, 5, 3, 6)
    expected = truth(model, texts)
    update = client_update(model, texts, config=ClientConfig(share="attention"))
    first = searched(model, update)
    assert_exact(first, expected)
    again = searched(model, update)
    assert (again.sequences, again.scores) == (first.sequences, first.scores)
    scaled = Update({name: -7 * tensor for name, tensor in update.gradients.items()})
    shuffled = random.Random(0).sample(texts, len(texts))
    for other in (
        scaled,
        client_update(model, shuffled, [1, 1, 1]),
        client_update(model, [*texts, texts[0]]),
        client_update(model, texts, config=ClientConfig(dtype="float64")),
    ):
        assert_exact(searched(model, other), expected)


@every("tiny_bert")
@pytest.mark.parametrize(("size", "seed"), [(1, 7), (2, 8), (2, 12)])
def test_it_agrees_with_the_exhaustive_search(model: LanguageModel, size: int, seed: int, random_texts: Draw) -> None:
    """The slow oracle enumerates every text; both find the batch, and nothing else."""
    texts = random_texts(size, seed, 2, 3)
    update = client_update(model, texts)
    expected = truth(model, texts)
    assert set(textbook_encoder_attack(model, update).sequences) == expected
    assert_exact(searched(model, update), expected, Status.TEXTS_COMPLETE)


# ---- parts that are left out


@every("tiny_bert")
@pytest.mark.parametrize("part", sorted(ENTRANCES))
def test_parts_can_be_left_out(
    model: LanguageModel, part: str, random_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is left out is never asked, and these two short texts are found without any one of them."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"{part} was asked")

    texts = random_texts(2, 9, 3, 5)
    monkeypatch.setattr(ENTRANCES[part], refuse)
    found = searched(model, client_update(model, texts), without=frozenset({part}))
    assert_exact(found, truth(model, texts), Status.TEXTS_COMPLETE)


@every("tiny_bert")
def test_less_is_found_without_the_relaxation_but_nothing_false(model: LanguageModel, random_texts: Draw) -> None:
    """Of two texts with words in common the likeliest tokens give one; the whole search gives both."""
    texts = random_texts(2, 10, 3, 5)
    update = client_update(model, texts)
    assert_exact(searched(model, update), truth(model, texts))
    found = searched(model, update, without=frozenset({"relaxation"}))
    assert len(found.sequences) == 1 and set(found.sequences) < truth(model, texts)
    assert found.status == Status.PARTIAL
    assert found.diagnosis == "7 of 13 rows confirmed: no seed leads to the others"


def test_a_part_that_does_not_exist_cannot_be_left_out() -> None:
    with pytest.raises(DagerError, match="without names 'magic'"):
        AttackConfig(without=frozenset({"magic"}))


@every("tiny_bert")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wrong_mates_cost_no_text(
    model: LanguageModel, share: float, random_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which tokens stand together is advice: none, some at random or all, the texts are the same."""

    def advice(marginals: Marginals, heads: int, where: Incidence) -> Tensor:
        draw = torch.rand(len(marginals.tokens), len(marginals.tokens), generator=torch.Generator().manual_seed(0))
        return (draw + draw.T) / 2 < share

    monkeypatch.setattr("dager_tutorial.server.encoder.run.same_text", advice)
    texts = random_texts(4, 3, 3, 7)
    assert_exact(searched(model, client_update(model, texts)), truth(model, texts))


# ---- time


@every("tiny_bert")
def test_a_budget_that_the_filter_spends(model: LanguageModel, random_texts: Draw) -> None:
    found = searched(model, client_update(model, random_texts(3, 4)), time_budget=1e-6)
    assert (found.status, found.sequences) == (Status.OUT_OF_TIME, ())
    assert found.diagnosis == "the time budget was spent while tokens were tested against block 0"


@every("tiny_bert")
@pytest.mark.parametrize("found_in_time", [1, 2, 3])
def test_a_budget_that_the_search_spends(
    model: LanguageModel, found_in_time: int, random_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that strikes with the n-th text: n are returned, and are complete only where there are no more."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dager_tutorial.server.budget.time", SimpleNamespace(perf_counter=lambda: clock.now))
    heard: list[tuple[int, int | None]] = []

    def listen(stage: str, done: int, total: int | None) -> None:
        if stage == "search":
            heard.append((done, total))
            clock.now = float(len(heard))

    texts = random_texts(3, 4, 3, 6)
    evidence = evidence_of(model, client_update(model, texts))
    outcome = recover_texts(evidence, Budget(deadline=found_in_time - 0.5, progress=listen))
    lengths = [len(text.tokens) for text in outcome.texts]
    rows = sum(map(len, truth(model, texts)))
    assert len(lengths) == found_in_time
    assert {text.tokens for text in outcome.texts} <= truth(model, texts)
    assert heard == [(sum(lengths[: count + 1]), rows) for count in range(found_in_time)]
    complete = found_in_time == len(texts)
    assert outcome.status == (Status.TEXTS_COMPLETE if complete else Status.OUT_OF_TIME)
    if not complete:
        assert outcome.diagnosis == f"{sum(lengths)} of {rows} rows confirmed when the time budget was spent"


# ---- what the update does not tell


@every("tiny_bert")
def test_what_the_update_does_not_tell(model: LanguageModel, random_texts: Draw) -> None:
    """Missing, zero and saturated gradients have a status and a reason, never an exception or a guess."""
    update = client_update(model, random_texts(2, 6))
    zeros = Update({name: torch.zeros_like(tensor) for name, tensor in update.gradients.items()})
    crowd = client_update(model, random_texts(16, 1))
    for told, status, reason in (
        (only(update, "layer.1.", "layer.2."), Status.NO_SIGNAL, "missing or zero"),
        (zeros, Status.NO_SIGNAL, "missing or zero"),
        (only(update, "0.attention.self"), Status.PARTIAL, "attention output gradient was not shared"),
        (only(update, "layer.0.attention"), Status.PARTIAL, "no tap beyond block 0's attention output"),
        (only(crowd, "attention"), Status.SATURATED, "block 0 is full"),
    ):
        found = searched(model, told)
        assert (found.status, found.sequences) == (status, ()), found.diagnosis
        assert reason in found.diagnosis


@every("tiny_bert")
def test_each_text_says_what_confirms_it(model: LanguageModel, random_texts: Draw) -> None:
    """Block 1's inputs where they were shared; else those of block 0's MLP, which hold every row as well."""
    texts = random_texts(2, 6)
    update = client_update(model, texts)
    for name, told in (("block 1 query, key, value", update), ("block 0 MLP", only(update, "layer.0."))):
        found = searched(model, told)
        assert_exact(found, truth(model, texts), Status.TEXTS_COMPLETE)
        for confirmation in found.confirmations:
            assert confirmation.certainty is Certainty.WHOLE
            assert [tap.name for tap in confirmation.taps] == ["block 0 attention output", name]


@every("tiny_bert")
@pytest.mark.parametrize("size", [5, 6, 8, 16])
def test_batches_about_as_large_as_the_width_yield_nothing_false(model: LanguageModel, size: int) -> None:
    """60 to 192 rows in 64 dimensions, of few words: the spans are nearly or quite full, and nothing may be guessed."""
    draw = random.Random(size)
    texts = [" ".join(draw.choices(WORDS[:12], k=10)) for _ in range(size)]
    found = searched(model, client_update(model, texts))
    assert set(found.sequences) <= truth(model, texts)
    full = (Status.SATURATED, "about as many rows as the model is")
    expected = (Status.TEXTS_COMPLETE, "all 60 rows") if size == 5 else full
    assert (found.status, expected[1] in found.diagnosis) == (expected[0], True), found.diagnosis


def test_one_block_holds_no_whole_texts(random_texts: Draw) -> None:
    """The last block's attention output has rows of what the loss reads only."""
    shallow = load_model("minilm-l6", blocks=1)
    found = searched(shallow, client_update(shallow, random_texts(2, 1), config=ClientConfig(share="attention")))
    assert (found.status, found.sequences) == (Status.PARTIAL, ())
    assert "load more blocks" in found.diagnosis


@every("tiny_bert", "tiny_distilbert", "tiny_roberta")
def test_noise_is_no_text(model: LanguageModel, random_texts: Draw) -> None:
    """A gradient of pure noise is called noise."""
    update = client_update(model, random_texts(2, 3))
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in update.gradients.items()}
    found = searched(model, replace(update, gradients=noise))
    assert (found.status, found.sequences) == (Status.NOISE, ())


@every("tiny_bert")
def test_noise_in_the_attention_output_alone(model: LanguageModel, random_texts: Draw) -> None:
    """The tokens are told, and no text can be."""
    update = client_update(model, random_texts(2, 3))
    draw = torch.Generator().manual_seed(0)
    noisy = {
        name: torch.randn(tensor.shape, generator=draw) if "0.attention.output" in name else tensor
        for name, tensor in update.gradients.items()
    }
    found = searched(model, replace(update, gradients=noisy))
    assert (found.status, found.sequences) == (Status.PARTIAL, ())
    assert "block 0's attention output gradient" in found.diagnosis and "noise" in found.diagnosis


@every("tiny_bert", "tiny_masked_bert")
def test_another_models_update_is_refused_by_its_texts(model: LanguageModel, random_texts: Draw) -> None:
    """Weights that are not the client's: its gradients hold a span, and nothing of this model lies in it."""
    other = replace(model, network=type(model.network)(model.network.config).eval().requires_grad_(False))
    found = searched(other, client_update(model, random_texts(2, 3)))
    assert (found.status, found.sequences) == (Status.WRONG_MODEL, ())


def test_a_real_model_gives_up_its_texts() -> None:
    """MiniLM, trained: one text longer than a head is wide (32), and short ones with common words."""
    model = load_model("minilm-l6")
    texts = [
        "The nurse on the night shift wrote that the patient in bed nine had refused the new tablets twice, "
        "asked for his daughter, and slept badly until the rain stopped shortly before the morning round.",
        "The rain stopped.",
        "She refused the tablets, and the daughter asked why.",
    ]
    found = searched(model, client_update(model, texts, config=ClientConfig(share="attention")))
    assert_exact(found, truth(model, texts), Status.TEXTS_COMPLETE)
    config = model.network.config
    assert max(map(len, found.sequences)) > config.hidden_size // config.num_attention_heads
