"""Masked-language training: how many tokens are asked for, and what becomes of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain

import pytest
from conftest import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.masking import IGNORED, masked_inputs
from dager_tutorial.client.step import client_update
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel, frame_ids

MASKED = ClientConfig(task="masked", dtype="float64")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(6, 200), min_size=1, max_size=40), min_size=1, max_size=5), st.integers(0, 9))
def test_masked_inputs_ask_for_a_share_of_every_text_and_leave_the_rest(words: list[list[int]], seed: int) -> None:
    tokenizer = word_tokenizer("mask")
    frame = sorted(frame_ids(tokenizer))
    assert tokenizer.mask_token_id not in frame and tokenizer.unk_token_id not in frame
    texts = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in words]
    inputs, targets = masked_inputs(tokenizer, texts, seed)
    for text, seen, asked in zip(texts, inputs, targets, strict=True):
        assert len(text) == len(seen) == len(asked)
        places = [place for place, target in enumerate(asked) if target != IGNORED]
        assert len(places) == max(1, round(0.15 * (len(text) - 2)))
        assert all(asked[place] == text[place] and text[place] not in frame for place in places)
        assert all(seen[place] == text[place] for place in set(range(len(text))) - set(places))
        assert all(0 <= token < len(tokenizer) for token in seen)
    assert masked_inputs(tokenizer, texts, seed) == (inputs, targets)
    turned = masked_inputs(tokenizer, texts[::-1], seed)
    assert sorted(zip(*turned, strict=True)) == sorted(zip(inputs, targets, strict=True))


def test_masks_are_drawn_as_bert_draws_them(tiny_distilbert: LanguageModel) -> None:
    """Of 15000 targets 80 % are masked, 10 % random (one in 700 of them the token itself) and 10 % kept."""
    tokenizer = tiny_distilbert.tokenizer
    texts = [[tokenizer.cls_token_id, *range(10, 510), tokenizer.sep_token_id]] * 200
    inputs, targets = masked_inputs(tokenizer, texts, 0)
    assert len({tuple(row) for row in inputs}) == 200  # equal texts are corrupted one by one
    pairs = zip(chain(*inputs), chain(*targets), strict=True)
    drawn = [(seen, asked) for seen, asked in pairs if asked != IGNORED]
    assert len(drawn) == 15000
    masked = sum(seen == tokenizer.mask_token_id for seen, _ in drawn) / len(drawn)
    kept = sum(seen == asked for seen, asked in drawn) / len(drawn)
    others = {seen for seen, asked in drawn if seen not in (asked, tokenizer.mask_token_id)}
    assert abs(masked - 0.8) < 0.015 and abs(kept - 0.1) < 0.012
    assert not others & set(tokenizer.all_special_ids) and len(others) > 0.8 * len(tokenizer)
    places = [asked for _, asked in drawn]
    assert min(map(places.count, range(10, 510))) > 10 and max(map(places.count, range(10, 510))) < 60
    assert masked_inputs(tokenizer, texts, 1) != (inputs, targets)


def test_a_text_of_special_tokens_has_no_target(tiny_distilbert: LanguageModel) -> None:
    texts = ["[SEP] [CLS]", "the dog is good"]
    both, alone = (client_update(tiny_distilbert, batch, config=MASKED).gradients for batch in (texts, texts[1:]))
    assert both.keys() == alone.keys()
    largest = max(float(tensor.norm()) for tensor in alone.values())
    assert all(float((both[name] - tensor).norm()) <= 1e-9 * largest for name, tensor in alone.items())
    with pytest.raises(DagerError, match="every text has special tokens only"):
        client_update(tiny_distilbert, texts[:1], config=MASKED)


def test_a_mask_token_that_the_model_has_not_is_named(tiny_bert: LanguageModel) -> None:
    tokenizer = copy.deepcopy(tiny_bert.tokenizer)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    with pytest.raises(DagerError, match="tokenizer and model do not belong together"):
        client_update(replace(tiny_bert, tokenizer=tokenizer), ["the dog is good"], config=MASKED)
