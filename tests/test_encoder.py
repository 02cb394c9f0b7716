"""The encoder attack on small models: every family and loss, what must not matter, and what it cannot tell."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import WORDS
from torch import Tensor

from dager_tutorial.server.attack import AttackConfig, attack
from dager_tutorial.client.step import client_update, encode, masked_inputs
from dager_tutorial.server.encoder.run import EncoderRun
from dager_tutorial.errors import DagerError
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.models.tap import ATTENTION_OUTPUT
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.textbook.encoder import textbook_encoder_attack
from dager_tutorial.server.unmixing import Incidence, Marginals
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
FAMILIES = ["tiny_bert", "tiny_masked_bert", "tiny_distilbert", "tiny_roberta"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


def every(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", names, indirect=True)


def truth(model: LanguageModel, texts: Sequence[str], task: str = "classification") -> set[tuple[int, ...]]:
    """The token sequences that the network saw."""
    ids = encode(model.tokenizer, texts)
    if task == "masked":
        ids = masked_inputs(model.tokenizer, ids, 0)[0]
    return {tuple(text) for text in ids}


def check_exact(found: Reconstruction, expected: set[tuple[int, ...]]) -> None:
    assert set(found.sequences) == expected
    assert len(found.sequences) == len(expected)
    assert found.status == "exact"


@every(FAMILIES)
@pytest.mark.parametrize("task", ["classification", "masked"])
def test_batches_are_exact(model: LanguageModel, task: str, random_texts: Draw) -> None:
    """Batches of 1 to 4 texts that share words, under both losses; 64 dimensions hold about 30 rows."""
    if task == "masked" and model.tokenizer.mask_token is None:
        pytest.skip("the tokenizer has no mask")
    for size, seed in ((1, 0), (2, 1), (3, 2), (4, 3)):
        texts = random_texts(size, seed, 2, 7)
        found = attack(model, client_update(model, texts, task=task))
        check_exact(found, truth(model, texts, task))
        assert max(found.scores) < 10


@every(["tiny_masked_bert"])
def test_masks_and_unknown_words_are_seen_in_the_texts(model: LanguageModel) -> None:
    found = attack(model, client_update(model, ["the cat zzyzx the dog"]))
    unknown = model.tokenizer.unk_token
    assert found.texts == (f"the cat {unknown} the dog",)
    found = attack(model, client_update(model, ["the cat saw the dog"], task="masked"))
    assert model.tokenizer.mask_token in found.texts[0]
    assert not any(frame in found.texts[0] for frame in (model.tokenizer.cls_token, model.tokenizer.sep_token))


@every(["tiny_bert"])
def test_words_that_repeat_within_and_between_texts(model: LanguageModel) -> None:
    """Words that stand several times, in one text or in all, at one position or at many."""
    texts = ["the cat and the dog and the bird", "the dog saw the big cat", "a cat saw the dog", "saw the the the cat"]
    check_exact(attack(model, client_update(model, texts)), truth(model, texts))


@every(["tiny_bert", "tiny_distilbert"])
def test_a_text_that_begins_another_and_one_that_ends_it(model: LanguageModel) -> None:
    """No prefix tree here: beginnings and ends of other texts are texts of their own."""
    texts = ["the old house by the river", "the old house", "by the river"]
    check_exact(attack(model, client_update(model, texts)), truth(model, texts))


@every(["tiny_bert"])
def test_what_does_not_change_the_answer(model: LanguageModel, random_texts: Draw) -> None:
    """Order and labels of the batch, a text given twice, the loss' scale, the sharing of more, and running it again."""
    texts = random_texts(3, 5, 3, 6)
    expected = truth(model, texts)
    update = client_update(model, texts, share="attention")
    first = attack(model, update)
    check_exact(first, expected)
    again = attack(model, update)
    assert (again.sequences, again.scores) == (first.sequences, first.scores)
    scaled = Update({name: -7 * tensor for name, tensor in update.gradients.items()})
    shuffled = random.Random(0).sample(texts, len(texts))
    for other in (
        scaled,
        client_update(model, shuffled, [1, 1, 1]),
        client_update(model, [*texts, texts[0]]),
        client_update(model, texts, share="all"),
        client_update(model, texts, padding_side="right", dtype="float64"),
    ):
        check_exact(attack(model, other), expected)


@every(["tiny_bert"])
def test_it_agrees_with_the_exhaustive_search(model: LanguageModel, random_texts: Draw) -> None:
    """The slow oracle enumerates every text; both find the same."""
    update = client_update(model, random_texts(2, 8, 2, 3))
    assert set(attack(model, update).sequences) == set(textbook_encoder_attack(model, update).sequences)


@every(["tiny_bert"])
@pytest.mark.parametrize("part", ["incidence", "relaxation", "polish"])
def test_parts_can_be_left_out(model: LanguageModel, part: str, random_texts: Draw) -> None:
    """An ablation finds less, or more slowly, but never anything false."""
    texts = random_texts(2, 9, 3, 5)
    found = attack(model, client_update(model, texts), config=AttackConfig(without=frozenset({part}), time_budget=20))
    assert set(found.sequences) <= truth(model, texts)
    assert (found.status == "exact") == (set(found.sequences) == truth(model, texts))
    with pytest.raises(DagerError, match="without names 'magic'"):
        AttackConfig(without=frozenset({"magic"}))


@every(["tiny_bert"])
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
    check_exact(attack(model, client_update(model, texts)), truth(model, texts))


@every(["tiny_bert"])
def test_a_spent_budget_is_partial(model: LanguageModel, random_texts: Draw) -> None:
    """What was confirmed so far is returned, and why it stopped is said."""
    update = client_update(model, random_texts(3, 4))
    found = attack(model, update, config=AttackConfig(time_budget=1e-6))
    assert found.status != "exact"
    assert "time budget" in found.diagnosis


@every(["tiny_bert"])
def test_what_the_update_does_not_tell(model: LanguageModel, random_texts: Draw) -> None:
    """Missing, zero and saturated gradients have a status and a reason, never an exception or a guess."""
    texts = random_texts(2, 6)
    update = client_update(model, texts)
    kept = {name: tensor for name, tensor in update.gradients.items() if "encoder.layer.0." not in name}
    assert attack(model, Update(kept)).status == "no_signal"
    zeros = Update({name: torch.zeros_like(tensor) for name, tensor in update.gradients.items()})
    assert attack(model, zeros).status == "no_signal"
    only = {name: tensor for name, tensor in update.gradients.items() if "0.attention.self" in name}
    without_outputs = attack(model, Update(only))
    assert without_outputs.status == "partial"
    assert "attention output" in without_outputs.diagnosis
    crowd = attack(model, client_update(model, random_texts(16, 1)))
    assert crowd.status == "saturated"
    assert crowd.sequences == ()


@every(["tiny_bert"])
def test_nothing_is_reported_that_no_deeper_tap_confirms(model: LanguageModel, random_texts: Draw) -> None:
    """A span taken too large lets texts cut short pass in block 0: the deeper blocks must refuse them."""
    texts = random_texts(2, 11, 5, 7)
    evidence = evidence_of(model, client_update(model, texts))
    run = EncoderRun(model, evidence, AttackConfig(time_budget=20), None, time.perf_counter())
    tap = evidence.adapter.tap(0, ATTENTION_OUTPUT)
    span = evidence.span(0, ATTENTION_OUTPUT)
    assert span is not None
    evidence.spans[tap] = replace(span, rank=span.rank + 25)
    assert set(run.search().sequences) <= truth(model, texts)
    deeper = {name: tensor for name, tensor in evidence.gradients.items() if "layer.0.attention" in name}
    alone = EncoderRun(
        model, replace(evidence, gradients=deeper, spans={}), AttackConfig(), None, time.perf_counter()
    ).search()
    assert (alone.status, alone.sequences) == ("partial", ())


@every(["tiny_bert"])
@pytest.mark.parametrize("size", [5, 6, 8, 16])
def test_batches_about_as_large_as_the_width_yield_nothing_false(model: LanguageModel, size: int) -> None:
    """60 to 192 rows in 64 dimensions, of few words: the spans are full or nearly so, and nothing may be guessed."""
    draw = random.Random(size)
    texts = [" ".join(draw.choices(WORDS[:12], k=10)) for _ in range(size)]
    found = attack(model, client_update(model, texts), config=AttackConfig(time_budget=20))
    assert set(found.sequences) <= truth(model, texts)
    assert found.status != "exact"


def test_one_block_holds_no_whole_texts(random_texts: Draw) -> None:
    """The last block's attention output has rows of what the loss reads only."""
    from dager_tutorial.zoo.names import load_model

    shallow = load_model("minilm-l6", blocks=1)
    found = attack(shallow, client_update(shallow, random_texts(2, 1), share="attention"))
    assert (found.status, found.sequences) == ("partial", ())
    assert "load more blocks" in found.diagnosis


@every(["tiny_bert"])
def test_noise_is_no_text(model: LanguageModel, random_texts: Draw) -> None:
    """A gradient of pure noise, and one of another model, yield nothing."""
    update = client_update(model, random_texts(2, 3))
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in update.gradients.items()}
    assert attack(model, replace(update, gradients=noise)).sequences == ()


def test_a_real_model_gives_up_its_texts() -> None:
    """MiniLM, trained: one text longer than a head is wide (32), and short ones with common words."""
    from dager_tutorial.zoo.names import load_model

    model = load_model("minilm-l6")
    texts = [
        "The nurse on the night shift wrote that the patient in bed nine had refused the new tablets twice, "
        "asked for his daughter, and slept badly until the rain stopped shortly before the morning round.",
        "The rain stopped.",
        "She refused the tablets, and the daughter asked why.",
    ]
    found = attack(model, client_update(model, texts, share="attention"))
    check_exact(found, truth(model, texts))
    config = model.network.config
    assert max(map(len, found.sequences)) > config.hidden_size // config.num_attention_heads
