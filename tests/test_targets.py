"""Last tokens, copies and texts that begin others, and what masks hid: from the gradient of one map."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from helpers import every, truth

from dager_tutorial.client.batch import encode, read_batch
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.masking import IGNORED
from dager_tutorial.client.step import client_update
from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.completion.output_rows import Place, output_rows
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.completion.targets import TargetCounts, masked_targets, next_token_targets, objective_of
from dager_tutorial.update import Update

EPSILON = 2.0**-23
TEXTS = [
    *["the river is cold", "the river is cold today", "the river", "a dog sleeps", "a dog"],
    *["we walk home"] * 3,
    *["blue blue sky is blue", "the the the"] * 2,
]
"""Texts that begin others, texts of two tokens, equal texts, first tokens that are repeated."""


def step(model: LanguageModel, texts: Sequence[str], **options: str) -> tuple[Update, Simulator]:
    """A client's update, and the server's copy of the client."""
    config = ClientConfig(**options)
    update = client_update(model, texts, config=config)
    return update, Simulator(model, update, Head(config.task), getattr(torch, config.dtype))


def whole_texts(model: LanguageModel, texts: Sequence[str]) -> Counter[Ids]:
    """The batch, without what leaves no trace: texts of one token."""
    return Counter(tuple(ids) for ids in encode(model.tokenizer, texts) if len(ids) > 1)


def residual(simulator: Simulator, update: Update, counts: TargetCounts) -> float:
    """The share of the update that texts and targets do not explain."""
    rest = {name: tensor.clone() for name, tensor in update.gradients.items()}
    simulator.subtract(rest, counts.texts, objective_of(counts))
    return _norm(rest.values()) / _norm(update.gradients.values())


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return torch.stack([each.double().norm() for each in tensors]).norm().item()


@every("shaken_gpt2", "tiny_llama", "tiny_llama_bos", "mistral", "qwen2")
def test_whole_texts_come_back_with_their_copies(model: LanguageModel) -> None:
    """The oracle is the batch; the certificate is its whole update, simulated."""
    update, simulator = step(model, TEXTS[:-4], task="next_token")
    leaves = sorted(truth(model, TEXTS[:-4], "next_token"))
    found = next_token_targets(simulator, update.gradients, leaves, EPSILON)
    assert found is not None and found.complete and not found.unclear
    assert dict(zip(found.texts, found.copies, strict=True)) == whole_texts(model, TEXTS[:-4])
    assert residual(simulator, update, found) < 1e-6


@every("shaken_gpt2", "tiny_llama")
def test_neither_order_nor_false_leaves_matter(model: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """A leaf that no text has gets no target, and so becomes no text."""
    texts = [*TEXTS[:5], *random_texts(6, 1)]
    update, simulator = step(model, texts, task="next_token")
    leaves = sorted(truth(model, texts, "next_token"))
    false = [(*leaves[0][:2], 7, 8), (*leaves[1], 9), (11, 12)]
    random.Random(0).shuffle(shuffled := leaves + false)
    for some in (leaves, shuffled):
        found = next_token_targets(simulator, update.gradients, some, EPSILON)
        assert found is not None and found.complete
        assert dict(zip(found.texts, found.copies, strict=True)) == whole_texts(model, texts)


@every("shaken_gpt2", "tiny_llama")
def test_a_first_token_repeated_is_explained(model: LanguageModel) -> None:
    """Rotary models cannot tell how often it was: what comes back explains the update, and doubt is admitted."""
    update, simulator = step(model, TEXTS, task="next_token")
    found = next_token_targets(simulator, update.gradients, sorted(truth(model, TEXTS, "next_token")), EPSILON)
    assert found is not None and found.complete and residual(simulator, update, found) < 1e-6
    exact = dict(zip(found.texts, found.copies, strict=True)) == whole_texts(model, TEXTS)
    assert exact or found.unclear


def test_one_wrong_target_shows_in_the_residual(tiny_llama: LanguageModel) -> None:
    """Another last token, another count, a text that is missing: each leaves a hundred times more."""
    update, simulator = step(tiny_llama, TEXTS[:5], task="next_token")
    leaves = sorted(truth(tiny_llama, TEXTS[:5], "next_token"))
    found = next_token_targets(simulator, update.gradients, leaves, EPSILON)
    assert found is not None
    best = residual(simulator, update, found)
    first, *others = found.texts
    wrong = [
        replace(found, texts=((*first[:-1], first[-1] + 1), *others)),
        replace(found, copies=(2, *found.copies[1:])),
        replace(found, texts=tuple(others), copies=found.copies[1:]),
        replace(found, predicted=found.predicted + 1),
    ]
    assert all(residual(simulator, update, each) > 100 * best for each in wrong)


@every("tiny_masked_bert", "tiny_distilbert", "tiny_roberta")
def test_what_masks_hid_comes_back(model: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """Masked, random and kept tokens; equal texts that are corrupted one by one, and some of them equally."""
    texts = [*random_texts(4, 2, 6, 9), *["we walk home"] * 6]
    update, simulator = step(model, texts, task="masked")
    batch = read_batch(model, texts, None, ClientConfig(task="masked"))
    wanted: dict[Ids, Counter[tuple[int, int]]] = {}
    for ids, targets in zip(batch.inputs, batch.targets or [], strict=True):
        asked = [(place, token) for place, token in enumerate(targets) if token != IGNORED]
        wanted.setdefault(tuple(ids), Counter()).update(asked)
    found = masked_targets(simulator, update.gradients, list(wanted), EPSILON)
    assert found is not None and found.complete and not found.unclear
    assert {text: Counter(asked) for text, asked in zip(found.texts, found.targets, strict=True)} == wanted
    assert residual(simulator, update, found) < 1e-6


@every("shaken_gpt2", "tiny_llama", "tiny_masked_bert", "tiny_roberta")
def test_pushing_and_pulling_are_adjoint(model: LanguageModel) -> None:
    """`<J^T v, r> = <v, J r>` for the way of every row, and rows come in the order in which they were asked for."""
    task = "masked" if model.tokenizer.mask_token else "next_token"
    _, simulator = step(model, TEXTS[:2], task=task)
    texts = [(7, 8, 9, 10), (11, 12)]
    rows = output_rows(simulator, texts, [Place(1, 1), Place(0, 3), Place(1, 0)])
    alone = output_rows(simulator, texts[1:], [Place(0, 1)])
    torch.testing.assert_close(rows.inputs[:1], alone.inputs, rtol=1e-4, atol=1e-6)
    v, r = torch.randn(2, 3, rows.means.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((rows.pulled(v) * r).sum(1), (v * rows.pushed(r)).sum(1), rtol=1e-4, atol=1e-5)


def test_where_the_map_says_nothing(tiny_gpt2: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """Not shared, or more rows than it has inputs: no answer, and no exception."""
    update, simulator = step(tiny_gpt2, TEXTS, task="next_token", share="attention")
    assert next_token_targets(simulator, update.gradients, [(7, 8)], EPSILON) is None
    many = random_texts(60, 3, 6, 9)
    update, simulator = step(tiny_gpt2, many, task="next_token")
    leaves = sorted(truth(tiny_gpt2, many, "next_token"))
    assert next_token_targets(simulator, update.gradients, leaves, EPSILON) is None
    assert next_token_targets(simulator, update.gradients, [], EPSILON) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_honest(tiny_llama: LanguageModel, dtype: str) -> None:
    """Nothing, doubt, or the truth."""
    update, simulator = step(tiny_llama, TEXTS[:5], task="next_token", dtype=dtype)
    leaves = sorted(truth(tiny_llama, TEXTS[:5], "next_token"))
    found = next_token_targets(simulator, update.gradients, leaves, torch.finfo(getattr(torch, dtype)).eps)
    exact = found and dict(zip(found.texts, found.copies, strict=True)) == whole_texts(tiny_llama, TEXTS[:5])
    assert found is None or exact or found.unclear


def test_double_precision_is_exact(tiny_llama: LanguageModel) -> None:
    """Though Llama's norms and the loss have the digits of float32 all the same."""
    update, simulator = step(tiny_llama, TEXTS[:5], task="next_token", dtype="float64")
    leaves = sorted(truth(tiny_llama, TEXTS[:5], "next_token"))
    found = next_token_targets(simulator, update.gradients, leaves, 2.0**-52)
    assert found is not None and not found.unclear
    assert dict(zip(found.texts, found.copies, strict=True)) == whole_texts(tiny_llama, TEXTS[:5])
    assert residual(simulator, update, found) < 1e-6


@every("shaken_gpt2", "tiny_llama")
def test_a_missing_text_is_noticed(model: LanguageModel, random_texts: Callable[..., list[str]]) -> None:
    """Rows that are not there make noise of all others: no counts, or counts that do not add up."""
    texts = random_texts(8, 4)
    update, simulator = step(model, texts, task="next_token")
    leaves = sorted(truth(model, texts, "next_token"))
    for missing in range(len(leaves)):
        some = leaves[:missing] + leaves[missing + 1 :]
        found = next_token_targets(simulator, update.gradients, some, EPSILON)
        assert found is None or not found.complete
