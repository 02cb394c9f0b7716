"""What an update says of vectors, tap by tap: near certainty where spans are clear, a lean where they are full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import WORDS, every
from torch import Tensor

from dager_tutorial.client.batch import encode
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import UpdateError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, QUERY, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.status import Status
from dager_tutorial.update import Update

Draw = Callable[..., list[str]]
Vectors = dict[Tap, Tensor]
PLACES = ((0, ATTENTION_OUTPUT), (0, MLP), (1, QKV), (1, ATTENTION_OUTPUT), (1, MLP))


def rows(model: LanguageModel, evidence: Evidence, texts: Sequence[str], place: int | None = None) -> Vectors:
    """What enters the taps of blocks 0 and 1 at every token of these texts, or at one place of each."""
    taps = [evidence.adapter.tap(*each) for each in PLACES]
    found: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    for tokens in encode(model.tokenizer, texts):
        ids = torch.tensor([tokens])
        for tap, vectors in evidence.adapter.tap_inputs(ids, torch.ones_like(ids), taps).items():
            found[tap].append(vectors[0] if place is None else vectors[0, place][None])
    return {tap: torch.cat(vectors) for tap, vectors in found.items()}


def wrong_endings(texts: Sequence[str]) -> list[str]:
    """Each text four times, with last words that are nowhere in the batch."""
    unused = sorted(set(WORDS) - set(" ".join(texts).split()))
    draw = torch.randint(len(unused), (len(texts), 4), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        " ".join([*text.split()[:-1], unused[index]])
        for text, indices in zip(texts, draw, strict=True)
        for index in indices
    ]


def true_and_false(model: LanguageModel, texts: Sequence[str]) -> tuple[Evidence, Vectors, Vectors]:
    """The evidence of a batch, all of its rows, and the rows of wrong last words."""
    evidence = evidence_of(model, client_update(model, texts))
    end = -1 if evidence.adapter.causal else -2  # [SEP] stands last
    return evidence, rows(model, evidence, texts), rows(model, evidence, wrong_endings(texts), end)


@every("tiny_gpt2", "tiny_llama", "mistral", "tiny_bert")
def test_clear_spans_leave_no_doubt(model: LanguageModel, random_texts: Draw) -> None:
    evidence, true, false = true_and_false(model, random_texts(2, 4, 4, 6))
    for tap, odds in evidence.log_odds(true).items():
        assert (odds > 1).all(), tap.name
    for tap, odds in evidence.log_odds(false).items():
        assert odds.tolist() == pytest.approx([math.log(constants().miss_rate)] * len(odds)), tap.name


@every("tiny_gpt2", "tiny_llama", "mistral", "tiny_bert")
def test_where_spans_are_full_taps_add_up(model: LanguageModel, random_texts: Draw) -> None:
    """Twice as many rows as the model is wide: the leverage speaks, and the sum says more than a tap does."""
    evidence, true, false = true_and_false(model, random_texts(16, 8, 8, 8))
    odds = [evidence.log_odds(each) for each in (true, false)]
    full = [tap for tap in true if evidence.present(tap)[tap].saturated]
    assert full and odds[0].keys() == odds[1].keys() == true.keys()
    for tap in full:
        assert odds[0][tap].mean() > 1 and odds[1][tap].mean() < -1
    sums = [torch.stack([*each.values()]).sum(0) for each in odds]
    single = [_area(odds[0][tap], odds[1][tap]) for tap in true]
    assert _area(*sums) > 0.75 and _area(*sums) > sum(single) / len(single)


def _area(true: Tensor, false: Tensor) -> float:
    """Share of pairs of a true and a false row that are in order."""
    return (true[:, None] > false).double().mean().item()


@every("tiny_gpt2", "tiny_bert")
def test_taps_that_say_nothing_are_left_out(model: LanguageModel, random_texts: Draw) -> None:
    texts = random_texts(2, 4)
    gradients = client_update(model, texts).gradients
    shared = evidence_of(model, client_update(model, texts, config=ClientConfig(share="attention")))
    vectors = rows(model, shared, texts)
    assert {tap.kind for tap in shared.log_odds(vectors)} == {QKV, ATTENTION_OUTPUT}
    tap = shared.adapter.tap(1, QKV)
    draw = torch.Generator().manual_seed(0)
    for spoilt, status in (
        (torch.zeros_like, Status.NO_SIGNAL),
        (lambda gradient: torch.randn(gradient.shape, generator=draw), Status.NOISE),
    ):
        changed = {name: spoilt(x) if name.endswith(tap.parameters) else x for name, x in gradients.items()}
        evidence = evidence_of(model, Update(changed))
        assert evidence.nothing_in(tap) is status
        assert tap not in evidence.log_odds(vectors) and len(evidence.log_odds(vectors)) == len(PLACES) - 1


@every("tiny_gpt2", "tiny_bert", "llama", "qwen2")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arithmetic_is_measured_and_grows_with_depth(model: LanguageModel, dtype: str) -> None:
    evidence = evidence_of(model, client_update(model, ["the dog is good"], config=ClientConfig(dtype=dtype)))
    adapter = evidence.adapter
    assert evidence.arithmetic(adapter.tap(0, QUERY)) == evidence.arithmetic(adapter.tap(0, QKV)) > 0
    assert evidence.arithmetic(adapter.tap(1, QUERY)) == evidence.arithmetic(adapter.tap(1, QKV))
    measured = [evidence.arithmetic(tap) for tap in adapter.taps() if tap.block < constants().probe_blocks]
    assert evidence.arithmetic(adapter.tap(2, MLP)) == pytest.approx(max(measured) * math.sqrt(2))


def test_what_was_read_is_read_once_and_counted(tiny_llama: LanguageModel) -> None:
    evidence = evidence_of(tiny_llama, client_update(tiny_llama, ["the dog is good"]))
    assert (evidence.used, evidence.parameters_used, evidence.watch.seconds) == (set(), 0, {})
    tap = evidence.adapter.tap(0, QKV)
    span = evidence.span(tap)
    assert span is evidence.span(tap) and set(evidence.watch.seconds) == {"subspace"}
    assert evidence.used == set(tap.parameters)
    assert evidence.parameters_used == sum(evidence.gradients[name].numel() for name in tap.parameters)
    assert span is not None and span.arithmetic >= evidence.arithmetic(tap)


def test_precision_is_the_coarsest_that_was_shared_or_that_the_numbers_show(
    tiny_gpt2: LanguageModel, tiny_bert: LanguageModel
) -> None:
    gradients = client_update(tiny_gpt2, ["the dog is good"]).gradients
    assert evidence_of(tiny_gpt2, Update(gradients)).precision == torch.float32
    one, *_ = (name for name in gradients if name.endswith("c_attn.weight"))
    mixed = Update(gradients | {one: gradients[one].bfloat16()})
    assert evidence_of(tiny_gpt2, mixed).precision == torch.bfloat16
    wide = Update({name: tensor.double() for name, tensor in gradients.items()})
    assert evidence_of(tiny_gpt2, wide).precision == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        cast = Update({name: tensor.to(dtype).float() for name, tensor in gradients.items()})
        assert evidence_of(tiny_gpt2, cast).precision == dtype
    with pytest.raises(UpdateError, match="name the model that the client used"):
        evidence_of(tiny_bert, mixed)
