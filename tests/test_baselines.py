"""The attacks that came before: the truth is where their distance is zero, and a tiny batch comes back by each."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import every
from torch import Tensor

from dager_tutorial.baselines.distances import cosine, squared, squared_and_absolute
from dager_tutorial.baselines.dlg import ORIGINAL, dlg
from dager_tutorial.baselines.dummy import DummyStep
from dager_tutorial.baselines.lamp import LampOptions, lamp
from dager_tutorial.baselines.matched import Matched
from dager_tutorial.baselines.matching import Matching, Schedule, normal_start
from dager_tutorial.baselines.moves import MOVES, proposals
from dager_tutorial.baselines.prior import BigramPrior, LanguagePrior
from dager_tutorial.baselines.run import Effort, attack_by
from dager_tutorial.baselines.tag import tag
from dager_tutorial.baselines.told import Told
from dager_tutorial.cli.app import main
from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.accuracy import Batch
from dager_tutorial.evaluation.metrics import score
from dager_tutorial.evaluation.priors import ATTACKS, PriorLimits, bench_priors, markdown_table, told_of
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.training import own_copy
from dager_tutorial.server.budget import Budget
from dager_tutorial.update import Update

TEXTS = ["the dog found a bird", "we drink tea"]
OWN = ["the cat found a mouse", "the dog found a ball", "we drink milk", "they drink tea", "we had a bird"]
ALL = ("tiny_gpt2", "tiny_llama", "tiny_llama_bos", "tiny_bert", "tiny_roberta", "tiny_distilbert")
DISTANCES = {"squared": squared, "tag": squared_and_absolute(0.01), "cosine": cosine}


def step_of(model: LanguageModel, texts: Sequence[str]) -> tuple[DummyStep, Tensor]:
    """The simulated step of a batch, and the embeddings of its texts, where the distance is zero."""
    update, truth = play(model, texts, config=ClientConfig(dtype=str(model.network.dtype).removeprefix("torch.")))
    step = DummyStep(model, update, told_of(truth))
    vectors = step.fixed.clone()
    for row, ids in enumerate(truth.sequences):
        vectors[row, : len(ids)] = step.embedding.weight[list(ids)]
    return step, vectors


def double(model: LanguageModel) -> LanguageModel:
    """The same in float64."""
    return replace(model, network=own_copy(model.network, torch.float64))


@every(*ALL)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_truth_has_distance_zero_and_other_texts_have_not(model: LanguageModel, distance: str) -> None:
    step, vectors = step_of(double(model), TEXTS)
    near = vectors + 0.01 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    guesses = torch.stack([vectors, vectors.flip(0), near])
    found = step.distances(guesses, step.chances.expand(3, -1, -1), DISTANCES[distance], Budget())
    assert found[0] < 1e-9 and found[1:].min() > 1e-6
    assert step.nearest.texts(vectors, step.frames) == tuple(
        tuple(row[: len(frame)]) for row, frame in zip(truth_rows(step, vectors), step.frames, strict=True)
    )


def truth_rows(step: DummyStep, vectors: Tensor) -> list[tuple[int, ...]]:
    """The tokens whose embeddings these are, exactly."""
    same = (vectors[:, :, None] == step.embedding.weight).all(-1)
    return [tuple(row.int().argmax(-1).tolist()) for row in same]


@every("tiny_gpt2", "tiny_llama", "tiny_bert")
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_derivative_is_that_of_finite_differences(model: LanguageModel, distance: str) -> None:
    step, _ = step_of(double(model), TEXTS)
    draw = torch.Generator().manual_seed(0)
    guess = normal_start(step, 1, draw, small=True).requires_grad_()
    labels = step.chances[None].clone().requires_grad_()

    def loss(vectors: Tensor, chances: Tensor) -> Tensor:
        return step.distances(vectors, chances, DISTANCES[distance], Budget()).sum()

    slopes = torch.autograd.grad(loss(guess, labels), (guess, labels))
    for place, slope in enumerate(slopes):
        way = torch.randn(slope.shape, generator=draw, dtype=slope.dtype)
        ends = []
        for size in (1e-5, -1e-5):
            at = [guess.detach(), labels.detach()]
            at[place] = at[place] + size * way
            ends.append(float(loss(at[0], at[1])))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((slope * way).sum()), rel=1e-3)
    assert not slopes[0][:, ~step.free].any()  # what is known does not move


def test_guesses_side_by_side_are_those_one_by_one(tiny_bert: LanguageModel) -> None:
    step, _ = step_of(double(tiny_bert), TEXTS)
    guesses, chances = normal_start(step, 3, torch.Generator().manual_seed(0)), step.chances[None]
    together = step.distances(guesses, chances.expand(3, -1, -1), squared, Budget())
    few = step.distances(guesses, chances.expand(3, -1, -1), squared, Budget(memory=1))
    each = [step.distances(guess[None], chances, squared, Budget())[0] for guess in guesses]
    assert together.tolist() == pytest.approx(few.tolist())
    assert together.tolist() == pytest.approx([float(one) for one in each])


def assert_recovered(result: Matched, truth: Truth) -> None:
    """The batch came back, the loss fell, and nothing is said to be certain."""
    assert score(result.found, truth).exact == 1.0, result.found.texts
    assert min(result.losses) < result.losses[0] / 10
    assert result.found.confirmed == () and set(result.found.scores) == {min(result.losses)}


@every("tiny_gpt2", "tiny_bert")
def test_dlg_recovers_a_short_text_from_a_small_start(model: LanguageModel) -> None:
    update, truth = play(model, ["drink tea"])
    assert_recovered(dlg(model, update, told_of(truth), schedule=LBFGS), truth)


LBFGS = replace(ORIGINAL, steps=8, small_start=True)
ADAM = Schedule(steps=150, learning_rate=0.01, restarts=3, small_start=True)
SHORT = Schedule(steps=100, learning_rate=0.01, decay=0.89)


@every("tiny_gpt2", "tiny_bert")
def test_tag_recovers_a_short_text_from_a_small_start(model: LanguageModel) -> None:
    update, truth = play(model, ["drink tea"])
    assert_recovered(tag(model, update, told_of(truth), schedule=ADAM), truth)


@every("tiny_gpt2", "tiny_bert")
def test_lamp_recovers_a_batch(model: LanguageModel) -> None:
    update, truth = play(model, ["they had a ball", "we drink tea"])
    options = LampOptions(candidates=10, proposals=16, every=20)
    assert_recovered(lamp(model, update, told_of(truth), BigramPrior(OWN), options=options, schedule=SHORT), truth)


def test_labels_that_are_not_told_are_optimised(tiny_gpt2: LanguageModel) -> None:
    update, truth = play(tiny_gpt2, ["we drink tea"])
    result = dlg(tiny_gpt2, update, told_of(truth, labels=False), schedule=replace(LBFGS, steps=3))
    assert result.found.labels == () and min(result.losses) < result.losses[0]


def test_the_best_of_all_restarts_is_the_answer(tiny_gpt2: LanguageModel) -> None:
    step, vectors = step_of(tiny_gpt2, TEXTS)
    start = normal_start(step, 3, torch.Generator().manual_seed(0))
    start[1] = vectors
    run = Matching(step, squared, Schedule(steps=2), Budget(), start)
    assert list(run.run()) == [1, 2]
    assert torch.equal(run.best.first, vectors) and run.best.history[0] == float(run.best.loss.min())


def test_a_spent_budget_ends_a_run_with_what_there_is(tiny_gpt2: LanguageModel) -> None:
    update, truth = play(tiny_gpt2, TEXTS)
    spent = Budget(deadline=0.0)
    for result in (
        dlg(tiny_gpt2, update, told_of(truth), budget=spent),
        lamp(tiny_gpt2, update, told_of(truth), BigramPrior(OWN), budget=spent),
    ):
        assert result.steps == 0 and [len(ids) for ids in result.found.sequences] == [5, 3]


def test_moves_keep_all_places_and_each_kind_does_what_it_says() -> None:
    chance, places = random.Random(0), [1, 2, 3, 4, 5]
    for move in MOVES:
        moved = [move(places, chance) for _ in range(50)]
        assert all(sorted(one) == places for one in moved) and len({tuple(one) for one in moved}) > 2
    swapped, *_, rotated = ([move(places, chance) for _ in range(50)] for move in MOVES)
    assert {sum(a != b for a, b in zip(one, places, strict=True)) for one in swapped} == {2}
    assert all(one[one.index(1) :] + one[: one.index(1)] == places for one in rotated)


def test_proposals_leave_the_frame_and_pads_alone() -> None:
    orders = proposals([1, 2, 3], 6, 41, random.Random(0))
    assert orders.shape == (41, 6) and orders[0].tolist() == list(range(6))
    assert torch.equal(orders[:, [0, 4, 5]], torch.tensor([0, 4, 5]).expand(41, -1))
    assert orders.sort(-1).values.eq(torch.arange(6)).all()
    assert proposals([2], 4, 5, random.Random(0)).eq(torch.arange(4)).all()


def test_a_language_prior_is_the_mean_loss_of_its_model(tiny_llama: LanguageModel) -> None:
    prior = LanguagePrior(tiny_llama)
    found = prior([*TEXTS, ""])
    for text, value in zip(TEXTS, found, strict=False):
        ids = torch.tensor([[1, *tiny_llama.tokenizer(text)["input_ids"]]])  # 1 is the token that begins and ends
        assert float(prior.network(input_ids=ids, labels=ids).loss) == pytest.approx(float(value), rel=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (lambda: Told(()), "positive number of tokens"),
        (lambda: Told((3, 0)), "positive number of tokens"),
        (lambda: Told((3,), (0, 1)), "2 labels for 1 lengths"),
        (lambda: Told((3,), (-1,)), "label -1 is negative"),
        (lambda: Schedule(steps=0), "steps is 0"),
        (lambda: Schedule(optimiser="sgd"), "choose one of adam"),
    ],
)
def test_what_cannot_be_is_refused(told, message: str) -> None:
    with pytest.raises(DagerError, match=message):
        told()


def test_what_cannot_be_matched_is_refused(tiny_gpt2: LanguageModel, tiny_bert: LanguageModel) -> None:
    update, truth = play(tiny_gpt2, TEXTS)
    told = told_of(truth)
    tokens = Update({"transformer.wte.weight": update.gradients["transformer.wte.weight"]})
    for wrong, head, message in (
        (update, Head("next_token"), "gradients of a classification"),
        (replace(update, kind="delta"), None, "gradients of a classification"),
        (tokens, None, "nothing that a simulated gradient"),
    ):
        with pytest.raises(DagerError, match=message):
            dlg(tiny_gpt2, wrong, told, head=head)
    with pytest.raises(DagerError, match="a length is 2"):
        dlg(tiny_bert, play(tiny_bert, TEXTS)[0], Told((2, 5), (0, 1)))
    with pytest.raises(DagerError, match="LAMP is told the labels"):
        lamp(tiny_gpt2, update, Told((5, 3)), BigramPrior(OWN))
    with pytest.raises(DagerError, match="needs a language prior"):
        attack_by("lamp", tiny_gpt2, update, told)
    with pytest.raises(DagerError, match="choose one of dlg, tag, lamp"):
        attack_by("tiger", tiny_gpt2, update, told)


def test_every_attack_by_its_name(tiny_gpt2: LanguageModel) -> None:
    update, truth = play(tiny_gpt2, ["we drink tea"])
    effort = Effort(steps=2, restarts=2, candidates=2, proposals=2)
    for method in ("dlg", "tag", "lamp"):
        result = attack_by(method, tiny_gpt2, update, told_of(truth), prior=BigramPrior(OWN), effort=effort)
        assert result.steps == 2 and len(result.losses) == 2


def test_all_attacks_meet_on_one_update(tiny_gpt2: LanguageModel) -> None:
    limits = PriorLimits(Effort(steps=2, candidates=2, proposals=2), seconds=60.0)
    batch = Batch("own", 3, ["we drink tea"])
    runs = list(bench_priors(tiny_gpt2, [batch], limits=limits, prior=BigramPrior(OWN)))
    assert tuple(run.attack for run in runs) == ATTACKS
    assert {run.attack: run.steps for run in runs} == {"ours": None, "textbook": None, "dlg": 2, "tag": 2, "lamp": 2}
    assert [run.exact for run in runs[:2]] == [1.0, 1.0] and runs[0].status == "certified"
    assert "| own | 1 | 3 | 3 | tag | 2 |" in markdown_table(runs)


def test_the_textbook_meets_an_encoder(tiny_bert: LanguageModel) -> None:
    limits = PriorLimits(Effort(steps=1), seconds=60.0)
    batches = [Batch("own", 0, ["we drink tea"])]
    (run,) = bench_priors(tiny_bert, batches, limits=limits, prior=BigramPrior(OWN), attacks=["textbook"])
    assert run.exact == 1.0


def test_the_command_tells_what_it_tells_and_refuses_what_does_not_belong(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_gpt2)
    asked = [
        "baseline",
        "--model",
        "tiny",
        "--text",
        "we drink tea",
        "--steps",
        "2",
        "--json",
        str(tmp_path / "run.json"),
    ]
    assert main([*asked, "--method", "dlg", "--no-tell-labels"]) == 0
    record = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert record["told_lengths"] == [3] and record["told_labels"] is None and record["steps"] == 2
    assert record["smallest_loss"] <= record["first_loss"]
    assert main([*asked, "--method", "lamp", "--candidates", "2", "--prior", "tiny"]) == 0
    capsys.readouterr()
    for wrong, said in (
        (["--method", "tag", "--prior", "tiny"], "belong to lamp"),
        (["--method", "lamp", "--no-tell-labels"], "belongs to dlg and tag"),
    ):
        assert main([*asked, *wrong]) == 2 and said in capsys.readouterr().err
    series = ["bench", "priors", "--model", "tiny", "--data", "notes", "--batch-size", "1", "--attack", "tiger"]
    assert main(series) == 2 and "choose one of ours, textbook" in capsys.readouterr().err
