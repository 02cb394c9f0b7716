"""The matching rule against brute force, what must not change a score, and the conventions for odd texts."""

from collections import Counter
from itertools import permutations
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from dager_tutorial.client.batch import Truth, encode, truth_of
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.masking import masked_inputs
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.metrics import Pair, Score, score
from dager_tutorial.evaluation.rouge import rouge_of, rouge_table
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Status

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef", "[MASK]")
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
NUMBERS = ("rouge1", "rouge2", "rougeL", "exact", "token_accuracy")


def word_model(*, framed: bool) -> LanguageModel:
    """A model whose tokens are single words: an encoder framed by [CLS] and [SEP], or a decoder framed by nothing."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if framed:
        ends = [("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "$A $B", ends)
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16}
    given = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": None} | size
    network = BertModel(BertConfig(**given, intermediate_size=8)) if framed else GPT2Model(GPT2Config(**given))
    return LanguageModel("words", network, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


PLAIN = word_model(framed=False)
FRAMED = word_model(framed=True)


def found(*texts: str) -> Reconstruction:
    """A reconstruction of these token sequences, each written as words."""
    sequences = tuple(tuple(VOCABULARY[word] for word in text.split()) for text in texts)
    return Reconstruction(sequences, texts, (1.0,) * len(texts), Status.PARTIAL)


def scored(recovered: Reconstruction, batch: list[str], model: LanguageModel, **options) -> Score:
    """The score against the truth of a client with these options."""
    return score(recovered, truth_of(model, batch, config=ClientConfig(**options)))


class Words:
    def tokenize(self, text):
        return text.split()


def slow_gain(truth: str, recovered: str) -> float:
    """ROUGE-1 + ROUGE-2 + exact of a pair of texts by rouge-score itself."""
    rouge = RougeScorer(["rouge1", "rouge2"], tokenizer=Words()).score(truth, recovered)
    exact = float(truth == recovered)
    return rouge["rouge1"].fmeasure + (exact if " " not in truth else rouge["rouge2"].fmeasure) + exact


def brute_force(truths: list[str], recovered: list[str]) -> float:
    """The largest gain a text over every way to give each distinct truth a sequence of its own, or none."""
    counts = Counter(truths)
    choices = [*recovered, *[""] * len(counts)]
    best = max(
        sum(count * slow_gain(truth, choice) for (truth, count), choice in zip(counts.items(), order, strict=False))
        for order in set(permutations(choices, len(counts)))
    )
    return best / len(truths)


texts_of_words = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(" ".join)
batches = st.lists(texts_of_words, min_size=1, max_size=4)
reconstructions = st.lists(texts_of_words, max_size=3)


@settings(max_examples=150, deadline=None)
@given(batches, reconstructions)
def test_no_assignment_is_better(batch, recovered):
    result = scored(found(*recovered), batch, PLAIN)
    assert result.rouge1 + result.rouge2 + result.exact == pytest.approx(brute_force(batch, recovered))
    assert all(0 <= getattr(result, name) <= 1 for name in NUMBERS)
    assert result.exact == pytest.approx(sum(pair.exact for pair in result.pairs) / len(batch))
    assert all(pair.exact == (pair.recovered == pair.text) for pair in result.pairs)


@settings(max_examples=75, deadline=None)
@given(batches, batches)
def test_the_table_is_what_rouge_score_says_of_each_pair(left, right):
    rows, columns = ([tuple(VOCABULARY[word] for word in text.split()) for text in side] for side in (left, right))
    for n in (1, 2):
        table = rouge_table(rows, columns, n)
        pairs = [[rouge_of(row, column)[f"rouge{n}"] for column in columns] for row in rows]
        assert table == pytest.approx(np.array(pairs))


@settings(max_examples=75, deadline=None)
@given(batches, reconstructions, st.randoms(use_true_random=False))
@example(["a", "a a", "b a", "b"], ["a", "a", "a a b a"], Random(0))  # two places for the second "a", equally good
def test_orders_frames_and_strangers_change_nothing(batch, recovered, random):
    result = scored(found(*recovered), batch, PLAIN)
    places = random.sample(range(len(batch)), len(batch))
    shuffled = random.sample([*recovered, "f", "d e f"], len(recovered) + 2)
    again = scored(found(*shuffled), [batch[place] for place in places], PLAIN)
    assert again.to_json() == result.to_json()
    assert again.pairs == tuple(result.pairs[place] for place in places)
    framed = scored(found(*(f"[CLS] {text} [SEP]" for text in recovered)), batch, FRAMED)
    expected = result.to_json() | {"n_tokens": result.n_tokens + 2 * len(batch)}
    assert framed.to_json() == expected


@settings(max_examples=75, deadline=None)
@given(batches)
def test_next_token_is_classification_without_the_last_token(batch):
    recovered = found(*(text.rpartition(" ")[0] for text in batch if " " in text))
    expected = [text.rpartition(" ")[0] for text in batch if " " in text]
    if not expected:
        with pytest.raises(DagerError, match="at least two tokens"):
            truth_of(PLAIN, batch, config=ClientConfig(task="next_token"))
        return
    result = scored(recovered, batch, PLAIN, task="next_token")
    assert all(getattr(result, name) == 1 for name in NUMBERS)
    assert (result.batch_size, result.n_tokens) == (len(batch), len(" ".join(batch).split()))
    assert scored(found("a b", "b"), batch, PLAIN, task="next_token").rougeL == (
        scored(found("a b", "b"), expected, PLAIN).rougeL
    )


@pytest.mark.parametrize(
    ("batch", "recovered", "expected"),
    [
        # three copies come back as one sequence and count three times
        (["a b", "a b", "a b", "c d"], ["a b"], (0.75, 0.75, 0.75, 0.75, 0.75)),
        # two places of four right, and one of three pairs of neighbours
        (["a b c d"], ["a b d c"], (1, 1 / 3, 3 / 4, 0, 1 / 2)),
        # a token of one text weighs as much as a token of another
        (["a", "b c d"], ["a"], (1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 4)),
        # one token: no neighbours, so ROUGE-2 is whether it is exact
        (["a"], ["a b"], (2 / 3, 0, 2 / 3, 0, 1)),
        # which makes an exact token worth 3, more than four texts that share it
        (["a", *["a b"] * 4], ["a"], (1 / 5, 1 / 5, 1 / 5, 1 / 5, 1 / 9)),
        # a repeated word counts as often as it is in both
        (["a a b"], ["a a a"], (2 / 3, 1 / 2, 2 / 3, 0, 2 / 3)),
        # the exact match outweighs the text that it would also help
        (["a b", "a c"], ["a c"], (1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2)),
        (["a b"], [], (0, 0, 0, 0, 0)),
        (["a b"], [""], (0, 0, 0, 0, 0)),
    ],
)
def test_by_hand(batch, recovered, expected):
    result = scored(found(*recovered), batch, PLAIN)
    assert [getattr(result, name) for name in NUMBERS] == pytest.approx(list(expected))


def test_special_tokens_earn_nothing_but_an_unknown_word_is_content():
    frame_only = scored(found("[CLS] [SEP]"), ["a b"], FRAMED)
    assert frame_only.pairs == (("a b", "", False, ()),)
    assert [getattr(frame_only, name) for name in NUMBERS] == [0] * 5
    unframed = scored(found("a b"), ["a b"], FRAMED)
    assert (unframed.rouge2, unframed.exact, unframed.token_accuracy) == (1, 0, 0)
    assert scored(found("[CLS] [UNK] [SEP]"), ["zebra"], FRAMED).exact == 1


def masked(batch: list[str], seed: int) -> list[str]:
    """The texts as the client's network sees them, written as words."""
    inputs, _ = masked_inputs(FRAMED.tokenizer, encode(FRAMED.tokenizer, batch), seed)
    return [" ".join(WORDS[token] for token in ids) for ids in inputs]


@settings(max_examples=75, deadline=None)
@given(batches, reconstructions, st.integers(0, 50))
def test_masked_scores_against_the_corrupted_texts(batch, recovered, seed):
    """The score is that of the corrupted batch as if nothing were masked, whatever was recovered, in any order."""
    corrupted = masked(batch, seed)
    found_some = found(*(f"[CLS] {text} [SEP]" for text in recovered), *corrupted[:2])
    result = scored(found_some, batch, FRAMED, task="masked", seed=seed)
    plain = [text.removeprefix("[CLS] ").removesuffix(" [SEP]") for text in corrupted]
    assert result.to_json() == scored(found_some, plain, FRAMED).to_json()
    assert [pair.text for pair in result.pairs] == batch
    assert scored(found_some, batch[::-1], FRAMED, task="masked", seed=seed).to_json() == result.to_json()
    everything = scored(found(*corrupted), batch, FRAMED, task="masked", seed=seed)
    assert all(getattr(everything, name) == 1 for name in NUMBERS)


def test_a_mask_is_content_and_the_seed_says_where_it_is():
    batch = ["a b c d e f a b c d"]
    before = scored(found("[CLS] a b c d e f a b c d [SEP]"), batch, FRAMED, task="masked")
    assert before.exact == 0 and 0.8 <= before.token_accuracy < 1  # two targets of ten, not both of them kept
    seen = found(*masked(batch, 0))
    assert [scored(seen, batch, FRAMED, task="masked", seed=seed).exact for seed in (0, 1)] == [1, 0]


def test_truncated_as_the_client_truncates():
    result = scored(found("a b"), ["a b c d"], PLAIN, max_length=2)
    assert result.pairs == (("a b c d", "a b", True, ()),)
    assert (result.exact, result.n_tokens, result.hidden_size) == (1, 2, 8)
    assert "pairs" not in result.to_json()


def by_hand(texts: list[str], sequences: list[tuple[int, ...]], frame: set[int]) -> Truth:
    """A truth that no tokenizer made, of a next-token client."""
    labels, n_tokens = (0,) * len(texts), sum(len(ids) + 1 for ids in sequences)
    return Truth(tuple(texts), labels, tuple(sequences), tuple(sequences), n_tokens, "next_token", 8, frozenset(frame))


def test_exact_is_told_by_tokens_not_by_texts():
    """A tokenizer that drops case or blanks gives back other texts of the same tokens, and equal texts of others."""
    truth = by_hand(["The Cat", "a  dog"], [(4, 5), (6, 7)], set())
    result = score(Reconstruction(((4, 5), (6, 8)), ("the cat", "a  dog"), (1.0, 1.0), Status.PARTIAL), truth)
    assert result.pairs == (Pair("The Cat", "the cat", True), Pair("a  dog", "a  dog", False))
    assert result.exact == 0.5


@pytest.mark.parametrize("frame", [(), (2,)], ids=str)
def test_a_text_of_which_nothing_can_be_recovered_is_left_out(frame):
    """One token under the next-token loss, alone or behind a token that begins every text."""
    truth = by_hand(["a", "b c"], [frame, (*frame, 6)], set(frame))
    result = score(Reconstruction(((*frame, 6),), ("b",), (1.0,), Status.PARTIAL), truth)
    assert [getattr(result, name) for name in NUMBERS] == [1] * 5
    assert result.pairs == (("a", "", False, ()), ("b c", "b", True, ()))
    assert (result.batch_size, result.n_tokens) == (2, 3 + 2 * len(frame))


@pytest.mark.parametrize("sequences", [[()], [(2,), (2, 3)]], ids=str)
def test_nothing_to_score(sequences):
    truth = by_hand(["a"] * len(sequences), sequences, {2, 3})
    with pytest.raises(DagerError, match=r"nothing to score: no text .* 'next_token'"):
        score(found("a"), truth)
