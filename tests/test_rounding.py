"""One block, piece by piece, against the whole network; and rounding errors that follow the client's precision."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import every

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import KINDS
from dager_tutorial.server import rounding
from dager_tutorial.server.rounding import probe, replay, rounding_errors

DECODERS = ("shaken_gpt2", "llama", "mistral", "qwen2", "smollm3", "smollm3-nope")
ENCODERS = ("shaken_bert", "shaken_distilbert", "shaken_roberta", "xlm-roberta", "camembert")


def entering(adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """What enters block 0: before its norm for a decoder, behind it for an encoder."""
    return rounding._entering(adapter, ids, torch.float32, ids.device)


@every(*DECODERS, *ENCODERS)
def test_replayed_blocks_are_the_networks(model: LanguageModel) -> None:
    """Every tap of every block, with windows, grouped queries, moved positions, and blocks without positions."""
    adapter = adapter_for(model.network)
    ids = probe(adapter, 3, 9, seed=2)
    seen = adapter.tap_inputs(ids, torch.ones_like(ids), adapter.taps())
    hidden = entering(adapter, ids)
    for block in range(adapter.num_blocks):
        replayed = replay(adapter, block, hidden)
        assert replayed.inputs.keys() == set(KINDS)
        for kind, vectors in replayed.inputs.items():
            torch.testing.assert_close(vectors, seen[adapter.tap(block, kind)], rtol=1e-4, atol=1e-4)
        hidden = replayed.hidden


@every(*DECODERS, *ENCODERS)
def test_errors_follow_the_precision(model: LanguageModel) -> None:
    adapter = adapter_for(model.network)
    fine, coarse = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16))
    of_client = {dtype: rounding_errors(adapter, dtype, 2) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    for tap in adapter.taps()[: 2 * len(KINDS)]:
        exact, usual, low = (errors[tap] for errors in of_client.values())
        assert fine / 10 < exact < usual < 10 * fine  # the server's own rounding is in all of them
        assert usual < low and coarse / 10 < low < 10 * coarse
    assert all(len(errors) == 2 * len(KINDS) for errors in of_client.values())


@every("shaken_gpt2", "llama", "smollm3", "shaken_bert", "camembert")
def test_the_errors_are_those_of_a_client(model: LanguageModel) -> None:
    """The whole network in bfloat16, on other texts, is as far from float32 as the probe of two blocks says."""
    adapter = adapter_for(model.network)
    ids = probe(adapter, 20, 4, seed=5)
    network = copy.deepcopy(model.network)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    of_client = adapter_for(network).tap_inputs(ids, torch.ones_like(ids), adapter.taps())
    vectors = adapter.tap_inputs(ids, torch.ones_like(ids), adapter.taps())
    for tap, expected in rounding_errors(adapter, torch.bfloat16, 2).items():
        difference = (of_client[tap].float() - vectors[tap]).norm(dim=-1) / vectors[tap].norm(dim=-1)
        assert difference.square().mean().sqrt().item() == pytest.approx(expected, rel=0.25), tap.name


def test_measuring_leaves_the_network_as_it_was(tiny_llama: LanguageModel) -> None:
    before = copy.deepcopy(tiny_llama.network.state_dict())
    rounding_errors(adapter_for(tiny_llama.network), torch.bfloat16, 3)
    after = tiny_llama.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], each) for name, each in before.items())
    assert {each.dtype for each in tiny_llama.network.parameters()} == {torch.float32}


def test_the_probe_depends_on_its_seed_alone(tiny_gpt2: LanguageModel) -> None:
    adapter = adapter_for(tiny_gpt2.network)
    ids = probe(adapter, 8, 4, seed=0)
    assert ids.shape == (8, 4) and int(ids.min()) >= 0 and int(ids.max()) < len(adapter.first_input.tokens)
    assert torch.equal(ids, probe(adapter, 8, 4, seed=0)) and not torch.equal(ids, probe(adapter, 8, 4, seed=1))
