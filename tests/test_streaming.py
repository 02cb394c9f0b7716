"""Models larger than memory: what is streamed is what is loaded whole, block by block, and every way it can break."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import LLAMAS, family
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from dager_tutorial.client.batch import truth_of
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError, ModelError
from dager_tutorial.evaluation.metrics import wanted
from dager_tutorial.models import adapter_for, streaming
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.streaming import absent, is_absent, is_streamed, resident_blocks
from dager_tutorial.server.attack import attack
from dager_tutorial.status import Status
from dager_tutorial.zoo import memory
from dager_tutorial.zoo.checkpoint import random_backbone
from dager_tutorial.zoo.drawn import write_random
from dager_tutorial.zoo.memory import needs_of
from dager_tutorial.zoo.names import available_models, export_model, load_model

TEXTS = ["the dog is good", "a cat and the animal", "the", "the boy had no idea"]
INDEX = "model.safetensors.index.json"


def written(model: LanguageModel, folder: Path) -> Path:
    """A model in bfloat16, as a checkpoint of many shards."""
    model.network.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    model.network.float()
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five blocks."""
    model = family("llama", blocks=5)
    return written(replace(model, network=random_backbone(model.network.config, 0)), tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def both(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    return load_model(str(folder), stream=False), load_model(str(folder), stream=True)


# ---- the same numbers, bit for bit


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "next_token"},
        {"share": "attention", "padding_side": "left"},
        {"dtype": "bfloat16"},
        {"dtype": "float64", "loss": "frobenius"},
    ],
)
def test_gradients_are_those_of_the_model_loaded_whole(options: dict, checkpoint: Path) -> None:
    whole, streamed = (client_update(model, TEXTS, config=ClientConfig(**options)) for model in both(checkpoint))
    assert whole.gradients.keys() == streamed.gradients.keys()
    assert all(torch.equal(whole.gradients[name], streamed.gradients[name]) for name in whole.gradients)


def test_tap_inputs_are_those_of_the_model_loaded_whole(checkpoint: Path) -> None:
    ids = torch.arange(24).view(3, 8)
    found = []
    for model in both(checkpoint):
        adapter = adapter_for(model.network)
        found.append(adapter.tap_inputs(ids, torch.ones_like(ids), adapter.taps()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(vectors, found[1][tap]) for tap, vectors in found[0].items())


@pytest.mark.parametrize("task", ["classification", "next_token"])
def test_a_streamed_attack_is_the_whole_one(task: str, checkpoint: Path) -> None:
    whole, streamed = both(checkpoint)
    update = client_update(streamed, TEXTS, config=ClientConfig(task=task))
    expected, found = attack(whole, update), attack(streamed, update)
    true = truth_of(whole, TEXTS, config=ClientConfig(task=task))
    assert found.status is Status.CERTIFIED and set(found.sequences) == set(wanted(found, true)) - {()}
    assert (found.sequences, found.scores, found.status) == (expected.sequences, expected.scores, expected.status)


@pytest.mark.parametrize("kind", [*LLAMAS, "xlm-roberta"])
def test_every_family_streams(kind: str, tmp_path: Path) -> None:
    model = family(kind)
    model = replace(model, network=random_backbone(model.network.config, 0))
    whole, streamed = both(written(model, tmp_path))
    assert is_streamed(streamed.network)
    update = client_update(streamed, TEXTS)
    assert all(
        torch.equal(tensor, update.gradients[name]) for name, tensor in client_update(whole, TEXTS).gradients.items()
    )
    assert attack(whole, update).sequences == attack(streamed, update).sequences


def test_a_checkpoint_with_a_head_is_streamed_headless(checkpoint: Path, tmp_path: Path) -> None:
    whole = load_model(str(checkpoint), stream=False)
    model = AutoModelForCausalLM.from_config(whole.network.config)
    model.model = whole.network
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    whole.tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    streamed = load_model(str(tmp_path), stream=True, blocks=4).network
    wanted = load_model(str(tmp_path), stream=False, blocks=4).network
    assert torch.equal(streamed(ids).last_hidden_state, wanted(ids).last_hidden_state)


# ---- what is in memory


class Watch:
    """Counts the blocks in memory before and behind every module that runs."""

    def __init__(self, adapter: Adapter) -> None:
        self.blocks, self.most, self.calls = adapter.blocks, 0, 0
        for module in self.blocks.modules():
            module.register_forward_pre_hook(self.look)
            module.register_forward_hook(self.look)

    def look(self, *_: object) -> None:
        self.most, self.calls = max(self.most, resident_blocks(self.blocks)), self.calls + 1


def test_two_blocks_stay_and_one_comes(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), stream=True)
    adapter = adapter_for(model.network)
    watch = Watch(adapter)
    assert resident_blocks(adapter.blocks) == 2
    update = client_update(model, TEXTS)
    assert attack(model, update).sequences
    assert watch.most == 3 and watch.calls > 100
    assert resident_blocks(adapter.blocks) == 2


def test_a_backward_pass_keeps_no_matrix(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, most = load_model(str(checkpoint), stream=True), [], [0]
    put = streaming.Stored.put

    def counted(self: streaming.Stored, parameter: torch.Tensor) -> None:
        put(self, parameter)
        storage = parameter.untyped_storage()
        alive.append(storage._weak_ref())
        expired = torch.UntypedStorage._expired
        most[0] = max(most[0], sum(not expired(each) for each in alive))

    monkeypatch.setattr(streaming.Stored, "put", counted)
    client_update(model, TEXTS, config=ClientConfig(share=["model.layers.0.self_attn.*"]))
    assert len(alive) == 2 * 3 * 7  # three deeper blocks, forward and again in the backward pass
    assert most[0] <= 2 * 7  # what a block's backward pass needs, while the next one comes


def test_a_pass_ends_with_the_last_tap(checkpoint: Path) -> None:
    adapter = adapter_for(load_model(str(checkpoint), stream=True).network)
    ran: list[int] = []
    for index, block in enumerate(adapter.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    ids = torch.arange(6)[None]
    found = adapter.tap_inputs(ids, torch.ones_like(ids), [adapter.tap(2, "MLP"), adapter.tap(1, "MLP")])
    assert len(found) == 2 and ran == [0, 1, 2]
    assert resident_blocks(adapter.blocks) == 2


def test_numbers_that_are_out_cannot_be_used_in_silence() -> None:
    linear = nn.Linear(3, 4)
    out = absent(linear.weight)
    assert is_absent(out) and not is_absent(linear.weight) and out.shape == (4, 3)
    assert out.untyped_storage().nbytes() == 4
    assert torch.nn.functional.linear(torch.zeros(1, 3), out).isnan().all()


def test_bfloat16_numbers_are_the_files(checkpoint: Path) -> None:
    network = load_model(str(checkpoint), stream=True).network
    stored = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    seen = {}
    network.layers[4].mlp.down_proj.register_forward_pre_hook(lambda module, _: seen.update(it=module.weight.clone()))
    network(torch.arange(4)[None])
    assert seen["it"].dtype == torch.float32
    assert torch.equal(seen["it"], stored["layers.4.mlp.down_proj.weight"].float())


# ---- whole or streamed


def free(monkeypatch: pytest.MonkeyPatch, bytes_: float) -> None:
    """Pretend that so much memory is free."""
    monkeypatch.setattr(memory, "available_memory", lambda: int(bytes_))
    monkeypatch.setattr("dager_tutorial.client.sharing.available_memory", lambda: int(bytes_))


def test_a_model_that_is_large_for_memory_is_streamed_unasked(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = needs_of(load_model(str(checkpoint)).network.config)
    for share, streamed in ((2.1, False), (1.9, True), (0.9, True)):
        free(monkeypatch, share * needs.whole)
        assert is_streamed(load_model(str(checkpoint)).network) == streamed


def test_what_does_not_fit_is_refused_with_the_way_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(checkpoint), stream=True)
    needs = needs_of(model.network.config)
    free(monkeypatch, 0.9 * needs.whole)
    with pytest.raises(ModelError, match=r"GB are free: use --stream"):
        load_model(str(checkpoint), stream=False)
    free(monkeypatch, 0.9 * needs.streamed)
    with pytest.raises(ModelError, match=r"streamed and .* --blocks"):
        load_model(str(checkpoint))
    with pytest.raises(ModelError, match=r"dager models export random:.*bfloat16.*--blocks"):
        load_model(f"random:{checkpoint}")
    with pytest.raises(DagerError, match=r"gradients of share 'all' take .* share fewer"):
        client_update(model, TEXTS)
    with pytest.raises(ModelError, match="no files to stream"):
        load_model("random:gpt2", stream=True)


def test_records_say_what_models_need() -> None:
    records = {record.name: record for record in available_models()}
    for name in ("minilm-l6", "random:bert-base-uncased"):
        needs = needs_of(load_model(name).network.config)
        assert (records[name].whole, records[name].streamed) == (needs.whole, needs.streamed)
    assert records["smollm2-135m"].streamed < records["smollm2-135m"].whole / 2


def test_names_with_a_star_share_what_they_match(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), blocks=1)
    update = client_update(model, TEXTS, config=ClientConfig(share=["*.q_proj.weight", "score.weight"]))
    assert sorted(update.gradients) == ["model.layers.0.self_attn.q_proj.weight", "score.weight"]
    with pytest.raises(DagerError, match=r"share names '\*\.w_proj"):
        client_update(model, TEXTS, config=ClientConfig(share=["*.w_proj"]))


# ---- random weights in shards


SHAPE = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize("made", [LlamaConfig, BertConfig])
def test_weights_drawn_in_parts_are_those_drawn_whole(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dager_tutorial.zoo.drawn.SHARD", 10_000)
    config, state = made(intermediate_size=48, **SHAPE), torch.get_rng_state()
    write_random(config, 3, tmp_path, torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    written = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    wanted = random_backbone(config, 3).state_dict()
    assert written.keys() == wanted.keys() and len(list(tmp_path.glob("*.safetensors"))) > 3
    assert all(torch.equal(written[name], wanted[name].bfloat16()) for name in wanted)


def test_families_that_cannot_be_drawn_in_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gpt2 model cannot be drawn in parts"):
        write_random(GPT2Config(**SHAPE), 0, tmp_path, torch.float32)


def test_a_random_model_too_large_for_memory_is_exported_in_shards(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    export_model(f"random:{checkpoint}", tmp_path / "whole", dtype="bfloat16")
    free(monkeypatch, 1e5)
    export_model(f"random:{checkpoint}", tmp_path / "parts", dtype="bfloat16")
    monkeypatch.undo()
    whole, parts = (load_model(str(tmp_path / name)).network.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- hostile and broken checkpoints


def told(folder: Path, *fragments: str) -> None:
    """Streaming the folder ends in one line that says these things."""
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), stream=True)
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_missing_and_truncated_shards_are_told(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    told(broken, str(shard), "copy the shard again")
    shard.write_bytes(b"\xff" * 64)
    told(broken, str(shard), "copy the shard again")
    shard.unlink()
    told(broken, str(shard), "copy the shard again")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "model.bin", "..", ""])
def test_an_index_cannot_lead_out_of_its_folder(name: str, broken: Path) -> None:
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"]["norm.weight"] = name
    (broken / INDEX).write_text(json.dumps(index))
    told(broken, INDEX, "not read")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"norm.weight": 3}}'])
def test_a_broken_index_is_told(content: str, broken: Path) -> None:
    (broken / INDEX).write_text(content)
    told(broken, INDEX, "no index of shards")


def holding(folder: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


@pytest.mark.parametrize(
    ("tensor", "fragments"),
    [
        (torch.zeros(64, 64, dtype=torch.int8), ["is I8", "BF16"]),
        (torch.zeros(64, 64, dtype=torch.float8_e4m3fn), ["is F8_E4M3", "BF16"]),
        (torch.zeros(64, 63), ["(64, 63)", "(64, 64)"]),
        (None, ["lacks layers.3.self_attn.q_proj.weight"]),
    ],
)
def test_tensors_that_are_not_as_they_should_be(tensor, fragments: list[str], broken: Path) -> None:
    name = "layers.3.self_attn.q_proj.weight"
    shard = holding(broken, name)
    tensors = load_file(shard) | {name: tensor}
    save_file({key: value.clone() for key, value in tensors.items() if value is not None}, shard)
    told(broken, str(shard), *fragments)


def test_an_unlisted_tensor_is_told(broken: Path) -> None:
    index = json.loads((broken / INDEX).read_text())
    del index["weight_map"]["layers.3.self_attn.q_proj.weight"]
    (broken / INDEX).write_text(json.dumps(index))
    told(broken, "layers.3.self_attn.q_proj.weight", "--no-stream")


def test_a_shard_that_vanishes_in_use_is_told(broken: Path) -> None:
    model = load_model(str(broken), stream=True)
    holding(broken, "layers.3.self_attn.q_proj.weight").unlink()
    with pytest.raises(ModelError, match=r"layers\.[23]\..*copy the file again"):
        client_update(model, TEXTS)
    assert resident_blocks(adapter_for(model.network).blocks) == 2
