"""What tests import: words and models to make texts and batches of, and the two questions that most of them ask.

Fixtures are in `conftest`, which pytest reads first.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    CamembertConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SmolLM3Config,
    XLMRobertaConfig,
)

from dager_tutorial.client.batch import truth_of
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.status import Status
from dager_tutorial.update import Update

WORDS = """
a about above across action actor after again age ago air all almost alone along also always among and angry
animal another answer any apple are arm around art as ask at away baby back bad bag ball bank be bear
beautiful because bed been before began behind believe best better between big bird black blood blue board
boat body bone book both bottle box boy bread break breakfast bridge bright bring brother brown build burn bus
business busy but buy by cake call came camera can car care carry case cat catch chair chance change cheap
cheese child church city class clean clear clever climb clock close cloud coat coffee cold come company cook
cool corn corner could country course cousin cover cow cross cry cup cut dance danger dark daughter day dead
dear decide deep desk did die different dinner dirty do doctor dog door down draw dream dress drink drive drop
dry during each ear early earth east easy eat edge egg empty end enough evening every eye face fact fall
family far farm fast father fear feel few field fight film find finger fire first fish floor flower fly follow
food foot for forest forget found free fresh friend from front fruit full funny game garden gave girl give
glad glass go gold good grass great green grey ground grow had hair half hand happy hard has hat have he head
hear heart heavy help her here high hill him his hold hole holiday home hope horse hospital hot hotel hour
house how hundred hungry husband ice idea if ill in inside into iron is island it job join jump just keep key
kind king kitchen knee knew know lady lake land large last late laugh lead leaf learn leave left leg less
letter life light like line lion lip listen little live long look lose loud love low lunch make man many map
mark market may me meal meat meet milk mind minute mirror money month moon more morning most mother mountain
mouth move music must my name near neck need never new news night no noise north nose not nothing now number
of off office often oil old on once one only open or orange other our out over page paint paper park part pass
pay pen people picture place plan play please pocket point poor quick quiet rain read red rest rice rich ride
right ring river road rock room round run sad said salt same sand school sea see she ship shirt shoe shop
short show sing sister sit sleep slow small smile snow so some song soon south stand star stay stone stop
story street strong sugar sun table take talk tall tea tell that the their then there they thing think this
tired to today together too town train tree true try under until up us very voice wait walk wall want warm was
watch water we week well went were west what when where white who why wife wind window winter with woman wood
word work world write year yes you young
""".split()  # noqa: SIM905
"""The ordinary words that the tiny tokenizers know, each one token."""

LLAMAS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, {}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "smollm3-nope": (SmolLM3Config, {"no_rope_layers": [0, 1, 1]}),
}
ROBERTAS = {"xlm-roberta": XLMRobertaConfig, "camembert": CamembertConfig}


def every(*names: str) -> pytest.MarkDecorator:
    """Run a test once for each of these models, which it gets as `model`.

    Args:
        names: `tiny_gpt2` and other fixtures; `shaken_gpt2` for such a model whose norms and biases are not as they
            start; the families of `family`, `mistral` for one, 128 wide as `mistral@128`.
    """
    return pytest.mark.parametrize("model", names, indirect=True)


def truth(
    model: LanguageModel, texts: Sequence[str], task: str = "classification", **options: Any
) -> set[tuple[int, ...]]:
    """What an attack can recover of a batch: the distinct texts, as the network saw them.

    Under the next-token loss a last token is only a target, and the end of a text that begins another leaves no trace.

    Args:
        model: The model.
        texts: The batch.
        task: What is trained.
        options: Other fields of `ClientConfig`.
    """
    seen = set(truth_of(model, texts, config=ClientConfig(task=task, **options)).sequences) - {()}
    if task != "next_token":
        return seen
    return {one for one in seen if not any(one == other[: len(one)] for other in seen - {one})}


def searched(model: LanguageModel, update: Update, **limits: Any) -> Reconstruction:
    """What the search alone makes of an update: nothing is weighed, taken off or proven.

    Args:
        model: The model both sides know.
        update: What the client sent.
        limits: Of `AttackConfig`; and `progress`.
    """
    progress = limits.pop("progress", None)
    return attack(model, update, config=AttackConfig(complete=False, **limits), progress=progress)


def assert_exact(found: Reconstruction, wanted: Collection[tuple[int, ...]], status: Status | None = None) -> None:
    """The texts that are wanted and no others came back, once each, and the attack knows it.

    Args:
        found: What came back.
        wanted: What should have, at least one text.
        status: The status that it must have; None for either of the two that count all rows.
    """
    assert wanted and sorted(found.sequences) == sorted(wanted), found.diagnosis
    complete = (Status.TEXTS_COMPLETE, Status.ROWS_COMPLETE)
    assert found.status in (complete if status is None else (status,)), found.diagnosis
    assert found.confirmed == found.sequences, found.confirmations


def friends(count: int, *groups: list[int]) -> Tensor:
    """Which tokens stand together: all of a group.

    Args:
        count: How many tokens there are.
        groups: Groups of tokens.
    """
    table = torch.zeros(count, count, dtype=torch.bool)
    for group in groups:
        for one in group:
            table[one, [other for other in group if other != one]] = True
    return table


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, lower-casing.

    Args:
        template: None for the way of GPT-2 (nothing added, no pad token), ``"bos"`` for Llama's (one token in
            front, no pad token), ``"cls"`` for BERT's (one in front, one behind, a pad token), ``"mask"`` for
            BERT's with a mask token, or ``"s"`` for RoBERTa's (likewise, the pad token's id is 1).
    """
    special = {
        None: {"unk_token": "<unk>", "eos_token": "<eos>"},
        "bos": {"unk_token": "<unk>", "eos_token": "<eos>", "bos_token": "<bos>"},
        "cls": {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "mask": {
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "s": {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
    }[template]
    ids = {word: index for index, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    framed = {"cls": "[CLS] $A [SEP]", "mask": "[CLS] $A [SEP]", "s": "<s> $A </s>"}
    single = ({None: None, "bos": "<bos> $A"} | framed)[template]
    if single:
        added = [(token, ids[token]) for token in special.values() if token in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def random_model(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A model of seeded random weights.

    Args:
        name: Its name.
        config: Its configuration; the vocabulary size is the tokenizer's.
        tokenizer: Its tokenizer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModel.from_config(config).eval().requires_grad_(False)
    return LanguageModel(name, network, tokenizer)


def shaken(model: LanguageModel) -> LanguageModel:
    """A copy whose norms and biases are as training leaves them: fresh ones, ones and zeros, hide mistakes."""
    model = replace(model, network=copy.deepcopy(model.network))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.network.named_parameters():
        if name.endswith("bias") or "norm" in name.lower() or ".ln_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@functools.cache
def family(kind: str, width: int = 64, blocks: int = 3) -> LanguageModel:
    """A random model with the structure of Llama or of RoBERTa under another name, shaken.

    Args:
        kind: A key of `LLAMAS` or `ROBERTAS`.
        width: Its hidden size.
        blocks: How many blocks it has.
    """
    tokenizer = word_tokenizer("cls" if kind in ROBERTAS else None)
    config = (_roberta_config if kind in ROBERTAS else _llama_config)(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return shaken(random_model(f"tiny-{kind}", config, tokenizer))


def _llama_config(kind: str, **shape: Any) -> PretrainedConfig:
    """Grouped queries; no special tokens but an end."""
    made, extra = LLAMAS[kind]
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    sizes = {"intermediate_size": 2 * shape["hidden_size"], "num_key_value_heads": 2, "max_position_embeddings": 520}
    return made(**shape, **tokens, **sizes, **extra)


def _roberta_config(kind: str, **shape: Any) -> PretrainedConfig:
    """The pad token is not where RoBERTa has it."""
    return ROBERTAS[kind](**shape, intermediate_size=160, pad_token_id=5, max_position_embeddings=70)


def saved(model, path):
    """A checkpoint folder, as `--model` takes it."""
    model.network.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)
