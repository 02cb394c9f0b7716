"""The client's gradients against plain transformers code, and against themselves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.masking import masked_inputs
from dager_tutorial.client.step import client_update
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.update import Update

TEXTS = ["the dog is good", "a cat", "we want more bread and milk today", "no"]
LABELS = [0, 2, 1, 0]
CAUSAL = ["tiny_gpt2", "tiny_llama", "tiny_llama_bos"]
MASKED = ["tiny_masked_bert", "tiny_distilbert", "tiny_roberta"]
ALL = [*CAUSAL, "tiny_bert", "tiny_distilbert", "tiny_roberta"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


def every(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", names, indirect=True)


def sent(model: LanguageModel, texts: list[str], labels: list[int] | None = None, **options) -> Update:
    """What a client with these options sends."""
    return client_update(model, texts, labels, config=ClientConfig(**options))


def assert_same(found: Update, wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal names, and tensors equal to a tolerance relative to each; true zeros (BERT's key biases) to the largest."""
    assert set(found.gradients) == set(wanted)
    largest = max(float(tensor.norm()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        error = float((found.gradients[name] - tensor).norm())
        assert error <= tolerance * (float(tensor.norm()) + 1e-3 * largest), name


def trained_norms(model: LanguageModel) -> LanguageModel:
    """The model with gains unlike one: else the squared last hidden state is constant and its gradient noise."""
    network = copy.deepcopy(model.network)
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if "norm" in type(module).__name__.lower():
            module.weight.data += 0.3 * torch.randn(module.weight.shape, generator=generator)
    return replace(model, network=network)


def load_backbone(client: nn.Module, model: LanguageModel) -> None:
    """Copy the shared weights; some classes have no place for the pooler."""
    left = client.base_model.load_state_dict(model.network.state_dict(), strict=False)
    assert not left.missing_keys and all(name.startswith("pooler") for name in left.unexpected_keys)


def seed_head(client: nn.Module, seed: int, head_std: float = 1e-3) -> None:
    """Give a head the weights that a seed stands for: of the given deviation only towards the classes."""
    generator = torch.Generator().manual_seed(seed)
    backbone = {id(parameter) for parameter in client.base_model.parameters()}
    for name, parameter in client.named_parameters():
        if parameter.ndim == 2 and id(parameter) not in backbone:
            std = head_std if name.split(".")[-2] in ("score", "classifier", "out_proj") else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
        elif name.endswith("bias") and id(parameter) not in backbone:
            parameter.data.zero_()


def plain(
    model: LanguageModel, auto: type, labels: torch.Tensor | None = None, **head
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A client written as any user of transformers would, in float64, with its own weights and the same head."""
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = copy.deepcopy(model.network.config)
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 3
    client = auto.from_config(config).eval()
    load_backbone(client, model)
    if auto is not AutoModelForCausalLM:
        seed_head(client, **head)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", padding_side="right")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    client.double()
    loss = client(**{k: v for k, v in batch.items() if k != "token_type_ids"}, labels=labels).loss
    loss.backward()
    return client, {n: p.grad for n, p in client.named_parameters() if p.grad is not None}


@every(*ALL)
@pytest.mark.parametrize("head", [{"seed": 0, "head_std": 1e-3}, {"seed": 5, "head_std": 0.03}], ids=str)
def test_classification_equals_plain_transformers(model: LanguageModel, head: dict) -> None:
    client, wanted = plain(model, AutoModelForSequenceClassification, torch.tensor(LABELS), **head)
    assert_same(sent(model, TEXTS, LABELS, dtype="float64", **head), wanted, 1e-9)
    assert_same(sent(model, TEXTS, LABELS, **head), wanted, 1e-4)
    assert set(wanted) == {name for name, _ in client.named_parameters()}


@every(*MASKED)
def test_masked_equals_plain_transformers_text_by_text(model: LanguageModel) -> None:
    """The oracle pads nothing: it adds up the cross-entropies of single texts over all targets of the batch."""
    client = AutoModelForMaskedLM.from_config(model.network.config).eval()
    load_backbone(client, model)
    seed_head(client, 7)
    client.double()
    inputs, targets = masked_inputs(model.tokenizer, encode(model.tokenizer, TEXTS), 7)
    rows = zip(map(torch.tensor, inputs), map(torch.tensor, targets), strict=True)
    losses = [nn.functional.cross_entropy(client(ids[None]).logits[0], row, reduction="sum") for ids, row in rows]
    (sum(losses) / sum(target >= 0 for row in targets for target in row)).backward()
    wanted = {n: p.grad for n, p in client.named_parameters()}
    for padding_side in ("right", "left"):
        options = {"task": "masked", "seed": 7, "padding_side": padding_side}
        assert_same(sent(model, TEXTS, dtype="float64", **options), wanted, 1e-9)
        assert_same(sent(model, TEXTS, **options), wanted, 1e-4)


@every(*CAUSAL)
def test_next_token_equals_plain_transformers(model: LanguageModel) -> None:
    _, wanted = plain(model, AutoModelForCausalLM)
    found = sent(model, TEXTS, task="next_token", dtype="float64")
    assert_same(found, wanted, 1e-5)  # transformers takes this loss in float32 whatever the model's dtype
    assert_same(sent(model, TEXTS, task="next_token"), wanted, 1e-4)


@pytest.mark.parametrize(
    ("model", "task", "decoder", "embedding"),
    [
        ("tiny_llama", "next_token", "lm_head", "model.embed_tokens"),
        ("tiny_masked_bert", "masked", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
        ("tiny_distilbert", "masked", "vocab_projector", "distilbert.embeddings.word_embeddings"),
        ("tiny_roberta", "masked", "lm_head.decoder", "roberta.embeddings.word_embeddings"),
    ],
    indirect=["model"],
)
def test_a_language_head_is_tied_or_made_and_shared(
    model: LanguageModel, task: str, decoder: str, embedding: str
) -> None:
    network = copy.deepcopy(model.network)
    network.config.tie_word_embeddings = False
    tied, untied = (sent(m, TEXTS, task=task) for m in (model, replace(model, network=network)))
    assert f"{decoder}.weight" not in tied.gradients
    assert (tied.gradients[f"{embedding}.weight"].norm(dim=1) > 0).all()  # as every token is a possible answer
    assert untied.gradients[f"{decoder}.weight"].shape == untied.gradients[f"{embedding}.weight"].shape
    assert not (untied.gradients[f"{embedding}.weight"].norm(dim=1) > 0).all()
    # What is left of the backbone's parameters are poolers, which a language model does not have.
    for update in (tied, untied):
        missing = dict(network.named_parameters()).keys() - update.for_backbone(network)
        assert all(name.startswith("pooler") for name in missing)


@every(*CAUSAL)
@pytest.mark.parametrize("task", ["classification", "next_token"])
@pytest.mark.parametrize("loss", ["cross_entropy", "frobenius"])
def test_padding_side_changes_nothing(model: LanguageModel, task: str, loss: str) -> None:
    model = trained_norms(model)
    right = sent(model, TEXTS, task=task, loss=loss, dtype="float64")
    left = sent(model, TEXTS, task=task, loss=loss, dtype="float64", padding_side="left")
    assert_same(left, right.gradients, 1e-6 if task == "next_token" else 1e-10)


@every(*ALL)
@pytest.mark.parametrize("loss", ["cross_entropy", "frobenius"])
def test_a_batch_is_the_mean_of_its_texts_in_any_order(model: LanguageModel, loss: str) -> None:
    """Neither padding nor neighbours reach a text: no pad enters the gradient."""
    model = trained_norms(model)
    options = {"loss": loss, "dtype": "float64"}
    batch = sent(model, TEXTS, [0, 1, 1, 0], **options)
    # Class 1 in each call keeps the head at two classes, with one seed the same head.
    alone = [sent(model, [text], [label], **options) for text, label in zip(TEXTS, [0, 1, 1, 0], strict=True)]
    mean = {name: sum(update.gradients[name] for update in alone) / len(alone) for name in batch.gradients}
    assert_same(batch, mean, 1e-9)
    order = [2, 0, 3, 1]
    shuffled = sent(model, [TEXTS[i] for i in order], [[0, 1, 1, 0][i] for i in order], **options)
    assert_same(shuffled, batch.gradients, 1e-9)


def test_a_text_that_ends_in_the_pad_token_is_read_to_its_end(tiny_gpt2: LanguageModel) -> None:
    """GPT-2 pads with its end-of-text token, and transformers looks for the last token that is not the pad."""
    texts = ["the dog <eos>", "a cat sat down on it"]
    batch = sent(tiny_gpt2, texts, [0, 0], dtype="float64")
    left = sent(tiny_gpt2, texts, [0, 0], dtype="float64", padding_side="left")
    assert_same(left, batch.gradients, 1e-10)
    position = batch.gradients["transformer.wpe.weight"].norm(dim=1)
    first = sent(tiny_gpt2, texts[:1], [0], dtype="float64").gradients["transformer.wpe.weight"].norm(dim=1)
    assert (first[:3] > 0).all()
    assert (position[:6] > 0).all()
    assert (position[6:] == 0).all()


@every(*ALL)
def test_share_restricts_and_the_model_is_left_as_it_was(model: LanguageModel) -> None:
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    config = copy.deepcopy(model.network.config)
    everything = sent(model, TEXTS).gradients
    for share in ("attention", list(everything)[3:5], [next(iter(everything))]):
        some = sent(model, TEXTS, share=share)
        assert 0 < len(some.gradients) < len(everything)
        assert share == "attention" or set(some.gradients) == set(share)
        assert_same(some, {name: everything[name] for name in some.gradients}, 1e-5)
    assert all(p.grad is None and not p.requires_grad for p in model.network.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.network.state_dict().items())
    assert model.network.config.to_dict() == config.to_dict()
    assert not model.network.training


@pytest.mark.parametrize(
    ("model", "maps"),
    [
        ("tiny_gpt2", ["attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"]),
        ("tiny_llama", [f"self_attn.{name}_proj.weight" for name in "qkvo"]),
        *(
            (model, [f"attention.{name}.{leaf}" for name in maps for leaf in ("weight", "bias")])
            for model, maps in [
                ("tiny_bert", ("self.query", "self.key", "self.value", "output.dense")),
                ("tiny_roberta", ("self.query", "self.key", "self.value", "output.dense")),
                ("tiny_distilbert", ("q_lin", "k_lin", "v_lin", "out_lin")),
            ]
        ),
    ],
    indirect=["model"],
)
def test_share_attention_is_the_linear_maps_of_attention(model: LanguageModel, maps: list[str]) -> None:
    names = list(sent(model, TEXTS, share="attention").gradients)
    block = {
        "tiny-gpt2": "transformer.h",
        "tiny-llama": "model.layers",
        "tiny-bert": "bert.encoder.layer",
        "tiny-distilbert": "distilbert.transformer.layer",
        "tiny-roberta": "roberta.encoder.layer",
    }[model.name]
    assert names == [f"{block}.{index}.{name}" for index in range(3) for name in maps]


@every(*ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
def test_dtypes(model: LanguageModel, dtype: str, tolerance: float) -> None:
    wanted = sent(model, TEXTS, dtype="float64").gradients
    found = sent(model, TEXTS, dtype=dtype)
    assert {tensor.dtype for tensor in found.gradients.values()} == {getattr(torch, dtype)}
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in found.gradients.values())
    error = sum(float((found.gradients[name].double() - tensor).square().sum()) for name, tensor in wanted.items())
    size = sum(float(tensor.square().sum()) for tensor in wanted.values())
    assert (error / size) ** 0.5 < tolerance
    assert model.network.dtype == torch.float32


def test_rotary_frequencies_keep_float32(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when transformers loads a checkpoint in bfloat16; rounded frequencies would be another model."""
    seen = []
    rotary = type(tiny_llama.network.rotary_emb)
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda self, *a, **k: seen.append(self.inv_freq) or forward(self, *a, **k))
    sent(tiny_llama, TEXTS, dtype="bfloat16", share="attention")
    assert all(torch.equal(frequencies, tiny_llama.network.rotary_emb.inv_freq) for frequencies in seen)
    assert seen


@pytest.mark.parametrize(
    ("model", "task"),
    [("tiny_gpt2", "classification"), *((name, "masked") for name in MASKED)],
    indirect=["model"],
)
def test_the_backbone_is_not_copied(model: LanguageModel, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(type(model.network), "__deepcopy__", lambda *_: copied.append(1), raising=False)
    seen = []
    handle = model.network.register_forward_hook(lambda module, *_: seen.append(module))
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    sent(model, TEXTS, task=task)
    handle.remove()
    assert seen == [model.network]
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.network.state_dict().items())
    assert not copied


def test_labels_and_seed_make_the_head(tiny_gpt2: LanguageModel) -> None:
    update = sent(tiny_gpt2, TEXTS, [0, 4, 1, 1])
    assert update.gradients["score.weight"].shape == (5, 64)
    default, given = sent(tiny_gpt2, TEXTS), sent(tiny_gpt2, TEXTS, [0, 1, 0, 1])
    other = sent(tiny_gpt2, TEXTS, seed=1)
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(default.gradients[name], given.gradients[name])
    assert not torch.allclose(default.gradients[name], other.gradients[name], rtol=0.1)
    assert (default.kind, default.model) == ("gradient", "tiny-gpt2")


def test_one_token_texts_classify(tiny_gpt2: LanguageModel) -> None:
    update = sent(tiny_gpt2, ["dog", "cat"])
    touched = update.gradients["transformer.wte.weight"].norm(dim=1).nonzero().flatten().tolist()
    assert sorted(touched) == sorted(ids[0] for ids in encode(tiny_gpt2.tokenizer, ["dog", "cat"]))
