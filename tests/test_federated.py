"""A client of FedAvg, and what the server reads off the difference of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import every

from dager_tutorial import attack, client_update, score
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, local_update, play_locally, summed
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import QKV
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.candidates import candidates_of
from dager_tutorial.server.constants import varied
from dager_tutorial.server.decoder.left_over import left_over
from dager_tutorial.server.embedding_rows import named_positions, named_tokens
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.token_filter import tells_tokens
from dager_tutorial.status import Certainty, Status
from dager_tutorial.update import Update

TEXTS = ["the river was cold and quiet", "my sister sold her small house", "we never talk about money at dinner",
         "a teacher told the children a story"]  # fmt: skip
FOUR = ClientConfig(head_std=0.02)


@every("tiny_gpt2", "tiny_llama")
def test_one_epoch_of_one_mini_batch_is_a_gradient(model: LanguageModel) -> None:
    exact = ClientConfig(dtype="float64")
    gradient = client_update(model, TEXTS, config=exact).gradients
    delta = local_update(model, TEXTS, config=exact, training=LocalTraining(1, len(TEXTS), 1e-2))
    assert (delta.kind, delta.learning_rate) == ("delta", 1e-2)
    assert delta.gradients.keys() == gradient.keys()
    for name, moved in delta.gradients.items():
        torch.testing.assert_close(moved, -1e-2 * gradient[name], rtol=1e-9, atol=1e-14)


def test_the_server_s_model_stays_as_it_is(tiny_gpt2: LanguageModel) -> None:
    before = {name: parameter.clone() for name, parameter in tiny_gpt2.network.named_parameters()}
    update = local_update(tiny_gpt2, TEXTS, training=LocalTraining(2, 3, 0.1, "adamw", frozen_embeddings=True))
    assert not [name for name in update.gradients if "wte" in name or "wpe" in name]
    for name, parameter in tiny_gpt2.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_sum_of_clients_is_one_update_and_gives_all_their_texts(tiny_gpt2: LanguageModel) -> None:
    training = LocalTraining(2, 1, 1e-2, tells_rate=False)
    clients = [play_locally(tiny_gpt2, TEXTS[i : i + 2], [0, 1], config=FOUR, training=training) for i in (0, 2)]
    parts = [update for update, _ in clients]
    total = summed(parts)
    name = next(iter(total.gradients))
    assert torch.equal(total.gradients[name], parts[0].gradients[name] + parts[1].gradients[name])
    found = attack(tiny_gpt2, total)
    assert set(found.sequences) >= {text for _, truth in clients for text in truth.sequences}
    with pytest.raises(DagerError, match="sum those of one round"):
        summed([parts[0], client_update(tiny_gpt2, TEXTS)])


@every("tiny_gpt2", "tiny_llama")
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_several_epochs_of_small_steps_give_the_texts_away(model: LanguageModel, optimizer: str) -> None:
    training = LocalTraining(3, 2, 1e-3, optimizer)
    update, truth = play_locally(model, TEXTS, config=FOUR, training=training)
    found = attack(model, update)
    assert score(found, truth).exact == 1, found.diagnosis
    for text, by in zip(found.sequences, found.confirmations, strict=True):
        assert text in truth.sequences or by.certainty is not Certainty.WHOLE


def left_of(
    model: LanguageModel, update: Update, texts: list[tuple[int, ...]], doubtful: Sequence[tuple[int, ...]] = ()
) -> set[int]:
    """The tokens of an update that texts leave over."""
    evidence = evidence_of(model, update)
    candidates = candidates_of(evidence, evidence.span(evidence.adapter.tap(0, QKV)), Budget())
    assert isinstance(evidence.adapter, DecoderAdapter)
    return set(left_over(evidence, evidence.adapter, texts, candidates, doubtful).distinct().tolist())


@every("tiny_gpt2", "tiny_llama")
def test_texts_that_are_known_leave_over_the_tokens_of_the_others(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, config=FOUR, training=LocalTraining(4, 2, 1e-3))
    texts, named = list(truth.sequences), left_of(model, update, [])
    for missing in texts:
        known = [text for text in texts if text != missing]
        held = {token for token in named if any(token in text for text in known)}
        common = {token for token in held if sum(token in text for text in known) > 1}
        left = left_of(model, update, known)
        assert left_of(model, update, known, known[:1]) == left | named & set(known[0])
        assert named & set(missing) - held | common <= left <= named & set(missing) | common
    assert left_of(model, update, texts[:1]) == named  # most of the tokens are left: too many to be sure of any
    assert left_of(model, update, [text[::-1] for text in texts]) == named
    frozen = local_update(model, TEXTS, config=FOUR, training=LocalTraining(4, 2, 1e-3, frozen_embeddings=True))
    assert left_of(model, frozen, texts) >= named


@every("tiny_gpt2", "tiny_llama", "tiny_llama_bos")
def test_all_texts_of_a_gradient_leave_nothing_of_the_rows(model: LanguageModel) -> None:
    update, truth = play(model, TEXTS, config=ClientConfig(dtype="float64"))
    with torch.no_grad(), varied(end_ridge=0.0, left_over=1e-3, common=9):
        assert left_of(model, update, list(truth.sequences)) == set()


@every("tiny_gpt2", "tiny_llama")
def test_embedding_rows_name_exactly_the_batch_s_tokens_and_its_length(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, training=LocalTraining(2, 2, 1e-2))
    evidence = evidence_of(model, update)
    named = named_tokens(evidence)
    assert named is not None
    assert set(named.tolist()) == {token for text in truth.sequences for token in text}
    longest = max(map(len, truth.sequences))
    assert named_positions(evidence) == (longest if evidence.adapter.first_input.positions is not None else None)
    frozen = local_update(model, TEXTS, training=LocalTraining(2, 2, 1e-2, frozen_embeddings=True))
    assert named_tokens(evidence_of(model, frozen)) is None


def told(model: LanguageModel, update: Update) -> bool:
    """Whether block 0 tells tokens."""
    evidence = evidence_of(model, update)
    span = evidence.span(evidence.adapter.tap(0, QKV))
    return span is not None and tells_tokens(evidence.adapter.first_input, span)


def test_steps_below_the_rounding_of_the_weights_are_said_to_be(tiny_gpt2: LanguageModel) -> None:
    update = local_update(tiny_gpt2, TEXTS, training=LocalTraining(2, 2, 1e-6))
    found = attack(tiny_gpt2, update)
    assert found.status is Status.BELOW_ROUNDING
    assert "did not move" in found.diagnosis and "nothing in block 0" in found.diagnosis and not found.sequences
    readable = local_update(tiny_gpt2, TEXTS, training=LocalTraining(2, 2, 1e-2))
    assert [told(tiny_gpt2, each) for each in (update, readable)] == [False, True]


def test_training_that_diverges_is_told(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(DagerError, match="smaller"):
        local_update(tiny_gpt2, TEXTS, training=LocalTraining(5, 1, 1e3))
