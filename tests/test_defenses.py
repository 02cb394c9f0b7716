"""Defences of a client: each against an oracle of its own, and what they leave of an update and of an attack."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import saved
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from opacus.accountants import create_accountant
from torch import nn

from dager_tutorial.cli import main
from dager_tutorial.client.batch import read_batch
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defended import Protection, play_defended
from dager_tutorial.client.defenses.chain import protected
from dager_tutorial.client.defenses.clipping import Clipping, length
from dager_tutorial.client.defenses.noise import Noise, generator
from dager_tutorial.client.defenses.pruning import PercentileFilter, Pruning
from dager_tutorial.client.defenses.rounding import STEPS, Rounding
from dager_tutorial.client.federated import LocalTraining
from dager_tutorial.client.private import Privacy, accounted
from dager_tutorial.client.step import client_update, gradients_of, play, ready, training
from dager_tutorial.errors import DagerError
from dager_tutorial.server.attack import attack
from dager_tutorial.status import Status
from dager_tutorial.update import Update

TEXTS = ["the black cat under our old table", "a doctor came late again", "she said good morning"]
STD = ClientConfig(head_std=0.02)  # so that every text has a gradient worth clipping
numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40).map(torch.tensor)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(numbers, numbers, st.floats(1e-3, 1e4))
def test_clipping_bounds_the_norm_and_keeps_the_direction(first, second, norm):
    gradients = {"a": first, "b": second}
    whole, each = Clipping(norm)(gradients), Clipping(norm, "tensor")(gradients)
    assert length(whole) == pytest.approx(min(norm, length(gradients)), rel=1e-5, abs=1e-30)
    for name, tensor in gradients.items():
        assert length({name: each[name]}) == pytest.approx(min(norm, length({name: tensor})), rel=1e-5, abs=1e-30)
        factor = length(whole) / max(length(gradients), 1e-300)
        torch.testing.assert_close(whole[name], tensor * factor, rtol=1e-4, atol=1e-30)


def test_noise_has_its_deviation_is_independent_and_differs_between_seeds():
    gradients = {"a": torch.full((300, 400), 3.0), "b": torch.zeros(1000, dtype=torch.float64)}
    first, second = (Noise(0.5)(gradients, generator(seed)) for seed in (0, 1))
    for noised in (first, second):
        rest = (noised["a"] - 3.0).flatten() / 0.5
        count = len(rest)
        assert abs(float(rest.mean())) < 4 / math.sqrt(count) and abs(float(rest.var()) - 1) < 4 * math.sqrt(2 / count)
        assert noised["b"].dtype == torch.float64
    correlation = torch.corrcoef(torch.stack([first["a"].flatten(), second["a"].flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(120_000)
    assert torch.equal(Noise(0.5)(gradients, generator(0))["a"], first["a"])


@given(st.integers(1, 400), st.floats(0.1, 100), st.sampled_from(["magnitude", "random"]), st.integers(0, 5))
def test_exactly_so_many_entries_are_kept_and_the_largest(size, keep, by, seed):
    tensor = torch.randn(size, generator=drawn(seed)) + 10
    pruned = Pruning(keep, by)({"w": tensor}, drawn(seed))["w"]
    kept = pruned != 0
    assert int(kept.sum()) == max(1, math.ceil(size * keep / 100)) and torch.equal(pruned[kept], tensor[kept])
    if by == "magnitude" and not kept.all():
        assert tensor[kept].min() >= tensor[~kept].max()


def test_pruning_of_the_whole_update_compares_all_entries():
    gradients = {"small": torch.full((2, 5), 0.1), "large": torch.arange(1.0, 31.0)}
    pruned = Pruning(25, each="update")(gradients)
    assert pruned["small"].shape == (2, 5) and not pruned["small"].any()
    assert torch.equal(pruned["large"].nonzero()[:, 0], torch.arange(20, 30))


def test_random_pruning_favours_no_place():
    kept = sum(Pruning(25, "random")({"w": torch.ones(8)}, drawn(seed))["w"] for seed in range(800))
    assert (kept - 200).abs().max() < 5 * math.sqrt(800 * 0.25 * 0.75)


def test_the_percentile_filter_is_nvflare_s():
    gradients = {"a": torch.randn(50, 40, generator=drawn()) * 0.02, "b": torch.randn(30, generator=drawn(1))}
    dxo = DXO(DataKind.WEIGHT_DIFF, {name: tensor.numpy().copy() for name, tensor in gradients.items()})
    theirs = PercentilePrivacy().process_dxo(dxo, Shareable(), FLContext()).data
    ours = PercentileFilter()(gradients)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.numpy(), theirs[name])
    assert int((ours["a"] == 0).sum()) > 100


@given(numbers)
@settings(max_examples=50)
def test_int8_errs_by_half_a_step_at_most_and_a_whole_one_by_chance(tensor):
    step = float(tensor.abs().max()) / STEPS
    for stochastic, most in ((False, 0.5), (True, 1.0)):
        rounded = Rounding("int8", stochastic)({"w": tensor}, drawn())["w"]
        assert float((rounded - tensor).abs().max()) <= most * step * (1 + 1e-4) + 1e-30
        assert len(rounded.unique()) <= 2 * STEPS + 1


def test_stochastic_rounding_is_right_on_average_where_the_nearest_step_is_not():
    tensor = torch.cat([torch.full((100_000,), 0.3), torch.tensor([float(STEPS)])])  # a step is 1
    assert float(Rounding("int8")({"w": tensor})["w"][:-1].mean()) == 0
    by_chance = Rounding("int8", stochastic=True)({"w": tensor}, drawn())["w"][:-1]
    assert abs(float(by_chance.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 100_000)
    signs = Rounding("sign")({"w": torch.tensor([[1.0, -2.0], [0.0, 5.0]])})["w"]
    assert signs.tolist() == [[2.0, -2.0], [0.0, 2.0]]


def test_a_chain_keeps_its_order_its_update_and_counts_what_is_left():
    update = Update({"w": torch.arange(1.0, 101.0)})
    sent, left = protected(update, [Clipping(1.0), Noise(1e-6), Pruning(10), Rounding("int8")])
    assert sent.defences == "clip=1, noise=1e-06, keep=10% by magnitude, bits=int8"
    assert left.norm == pytest.approx(length(update.gradients)) and left.bounded == pytest.approx(1.0)
    assert (left.relative, left.kept, left.numbers) == (pytest.approx(1e-6), 10, 100)
    assert left.bytes == (10 * 8 + 100 + 7) // 8  # a map of a hundred bits is cheaper than ten indices
    assert update.gradients["w"].tolist() == list(range(1, 101)) and update.defences is None
    assert protected(update, [Clipping(10.0), Clipping(1.0)])[0].defences == "clip=10, clip=1"


@pytest.mark.parametrize("asked", [Privacy(1.0), Privacy(8.0, 1e-6), Privacy(50.0)])
def test_the_promise_of_one_release_is_that_of_the_gaussian_mechanism(asked):
    """Balle and Wang (2018), theorem 8: the smallest delta of one release with sensitivity 1."""

    def delta(multiplier: float) -> float:
        half, shift = 1 / (2 * multiplier), asked.epsilon * multiplier
        places = torch.tensor([half - shift, -half - shift], dtype=torch.float64)
        first, second = torch.special.log_ndtr(places).tolist()
        return math.exp(first) - math.exp(asked.epsilon + second)

    counted = accounted(asked)
    assert asked.epsilon - 0.05 <= counted.epsilon <= asked.epsilon
    assert 0.5 * asked.delta < delta(counted.multiplier) <= asked.delta
    # The formula is proven below epsilon 1 and wasteful there; far above it promises what it does not keep.
    assert (delta(asked.one_release) > asked.delta) == (counted.formula_epsilon > asked.epsilon)
    assert (counted.formula_epsilon > asked.epsilon) == (asked.epsilon == 50.0)


def test_the_promise_of_many_steps_is_what_opacus_counts_step_by_step():
    asked = Privacy(3.0, sample_rate=0.05, steps=40)
    counted = accounted(asked)
    accountant = create_accountant("prv")
    for _ in range(40):
        accountant.step(noise_multiplier=counted.multiplier, sample_rate=0.05)
    assert counted.epsilon == pytest.approx(accountant.get_epsilon(1e-5)) and counted.epsilon <= 3.0
    assert counted.deviation(4) == counted.multiplier / 4


@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_dp_sgd_is_the_mean_of_clipped_gradients_of_single_texts_with_noise(task, tiny_gpt2):
    config = replace(STD, task=task)
    single = [client_update(tiny_gpt2, [text], [label], config=config) for label, text in enumerate(TEXTS[:2])]
    clip = 0.5 * min(length(one.gradients) for one in single)
    asked = Privacy(100.0, clip=clip)
    sent = play_defended(tiny_gpt2, TEXTS[:2], config=config, protection=Protection(privacy=asked))
    clipped = [Clipping(clip)(one.gradients) for one in single]
    mean = {name: (clipped[0][name] + clipped[1][name]) / 2 for name in clipped[0]}
    assert sent.left.norm == pytest.approx(length(mean), rel=1e-4)
    noise = torch.cat([(sent.update.gradients[name] - mean[name]).flatten() for name in mean])
    expected = accounted(asked).multiplier * clip / 2
    assert sent.left.deviation == pytest.approx(expected)
    assert float(noise.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * len(noise)))
    assert sent.promise["epsilon"] <= 100 and "one_release_multiplier" in sent.promise
    assert all(not hasattr(each, "grad_sample") and each.grad is None for each in tiny_gpt2.network.parameters())


def test_dp_sgd_gives_nothing_away_at_any_usual_epsilon(tiny_gpt2):
    for epsilon in (1.0, 8.0, 50.0):
        sent = play_defended(tiny_gpt2, TEXTS, config=STD, protection=Protection(privacy=Privacy(epsilon)))
        found = attack(tiny_gpt2, sent.update)
        assert found.status in (Status.NOISE, Status.SATURATED) and found.confirmed == ()
    with pytest.raises(DagerError, match="DP-SGD is one step"):
        protection = Protection(privacy=Privacy(8.0))
        play_defended(tiny_gpt2, TEXTS, config=STD, training=LocalTraining(), protection=protection)


@pytest.mark.parametrize("scope", ["update", "tensor"])
def test_an_attack_finds_the_same_texts_behind_clipping(scope, tiny_gpt2):
    update, _ = play(tiny_gpt2, TEXTS, config=STD)
    clipped, _ = protected(update, [Clipping(1e-3 * length(update.gradients), scope)])
    plain, behind = attack(tiny_gpt2, update), attack(tiny_gpt2, clipped)
    assert set(behind.sequences) == set(plain.sequences) and set(behind.confirmed) == set(plain.confirmed)
    assert sorted(behind.texts) == sorted(TEXTS)


def test_dropout_is_training_mode_as_transformers_has_it(tiny_gpt2, tiny_llama, tiny_bert):
    for model in (tiny_gpt2, tiny_llama, tiny_bert):
        config = replace(STD, dropout=0.3)
        one, again = (client_update(model, TEXTS, config=config).gradients for _ in range(2))
        plain = client_update(model, TEXTS, config=STD).gradients
        other = client_update(model, TEXTS, config=replace(config, seed=5, head_std=0.02)).gradients
        name = next(iter(plain))
        assert all(torch.equal(one[each], again[each]) for each in one)
        assert not torch.allclose(one[name], plain[name], rtol=0.01, atol=0)
        assert not torch.allclose(one[name], other[name], rtol=0.01, atol=0)
        assert not any(module.training for module in model.network.modules())
        assert 0.3 not in {module.p for module in model.network.modules() if isinstance(module, nn.Dropout)}


def test_dropout_zeroes_its_share_and_tells_the_server_its_strength(tiny_gpt2):
    sent = play_defended(tiny_gpt2, TEXTS, config=STD, protection=Protection(0.25, chain=(Clipping(1.0),)))
    assert sent.update.defences == "dropout=0.25, clip=1"
    shares = []
    config = replace(STD, dropout=0.25)
    batch = read_batch(tiny_gpt2, TEXTS, None, config)
    network = ready(tiny_gpt2, batch, config)
    hook = tiny_gpt2.network.drop.register_forward_hook(
        lambda module, inputs, output: shares.append(float((output == 0).float().mean()))
    )
    with training(network, config):
        gradients_of(network, batch, config)
    hook.remove()
    assert len(shares) == 1 and abs(shares[0] - 0.25) < 0.05


def test_the_command_line_defends_says_so_and_tells_the_server_the_strength_alone(tiny_gpt2, tmp_path, capsys):
    tiny_folder = saved(tiny_gpt2, tmp_path / "model")
    made, record = tmp_path / "update.safetensors", tmp_path / "record.json"
    options = ["--clip", "0.5", "--noise", "1e-6", "--keep", "90", "--bits", "8", "--dropout", "0.1"]
    arguments = ["--model", tiny_folder, "--text", TEXTS[0], "--head-std", "0.02", *options, "--json", str(record)]
    assert main(["capture", "--out", str(made), *arguments]) == 0
    said, read = json.loads(record.read_text()), Update.load(made)
    assert said["defences"] == read.defences == "dropout=0.1, clip=0.5, noise=1e-06, keep=90% by magnitude, bits=int8"
    assert said["noise_over_norm"] == pytest.approx(1e-6 / min(0.5, said["gradient_norm"]))
    assert said["entries_kept"] <= said["entries"] and "noise over norm" in capsys.readouterr().out
    assert main(["attack", *arguments[:6], "--epsilon", "8", "--clip", "1", "--json", str(record)]) == 0
    shown, said = capsys.readouterr().out, json.loads(record.read_text())
    assert said["delta"] == 1e-5 and said["accountant"] == "prv" and "one release multiplier" in shown
    assert said["epsilon"] <= 8 and said["exact"] == 0


MISTAKES = {
    "--epsilon needs --clip": ["--epsilon", "8"],
    "leave out --noise": ["--epsilon", "8", "--clip", "1", "--noise", "1"],
    "belong to --epsilon": ["--steps", "7"],
    "--clip-each belongs": ["--clip-each", "tensor"],
    "--keep-by and --keep-each belong": ["--keep-by", "random"],
    "--stochastic belongs": ["--bits", "bf16", "--stochastic"],
    "--epsilon is DP-SGD of one step": ["--epsilon", "8", "--clip", "1", "--epochs", "2"],
    "is not in the range": ["--keep", "0"],
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line(message, options, capsys):
    assert main(["attack", "--model", "nowhere", "--text", "a", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
