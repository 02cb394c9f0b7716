"""The search where no gap stands below the signal: its beams, and texts mended by the last block."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from helpers import every
from hypothesis import given
from hypothesis import strategies as st

from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.federated import LocalTraining, play_locally
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP_OUTPUT, QKV, QUERY
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.candidates import candidates_of
from dager_tutorial.server.constants import constants, varied
from dager_tutorial.server.decoder.beams import BeamSearch
from dager_tutorial.server.decoder.edits import Draft, nearby
from dager_tutorial.server.decoder.explained import unexplained
from dager_tutorial.server.decoder.last_block import LastBlock
from dager_tutorial.server.decoder.mending import Mender
from dager_tutorial.server.decoder.passage import Passage, Prefix
from dager_tutorial.server.decoder.paths import Paths, Row, circular, repeats, said_again, shared
from dager_tutorial.server.decoder.ranked import searched
from dager_tutorial.server.decoder.ranking import Misfit, Ranking, ranked_taps
from dager_tutorial.server.decoder.rivals import going_on
from dager_tutorial.server.decoder.seen_ends import SeenEnds
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.update import Update

TEXTS = ["the river was cold and quiet", "my sister sold her small house", "we never talk about money at dinner",
         "a teacher told the children a story"]  # fmt: skip
FOUR = ClientConfig(head_std=0.02)
TRAINING = LocalTraining(10, 2, 1e-2)


def searching(model: LanguageModel, update: Update) -> tuple[BeamSearch, Ranking]:
    """A search that has not begun, and what weighs its extensions."""
    evidence, budget = evidence_of(model, update), Budget()
    adapter = evidence.adapter
    assert isinstance(adapter, DecoderAdapter)
    candidates = candidates_of(evidence, evidence.span(adapter.tap(0, QKV)), budget)
    ends = [adapter.tap(adapter.num_blocks - 1, kind) for kind in (ATTENTION_OUTPUT, QUERY, MLP_OUTPUT)]
    last = LastBlock(adapter, evidence.present(*ends))
    readers = {tap: Misfit(span) for tap, span in evidence.present(*ranked_taps(adapter, 1)).items()}
    ranking = Ranking(Passage(adapter, readers, budget, blocks=1), candidates.distinct(), budget.generator())
    return BeamSearch(candidates, last, budget), ranking


def test_what_one_search_tells_or_leaves_open_is_kept_by_the_next_one(tiny_llama: LanguageModel) -> None:
    update, truth = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(tiny_llama, update)
    search.run(ranking)
    found, told = set(search.texts), search.told
    assert 0 < len(told) < len(found) and set(told) <= set(truth.sequences)
    search.budget = Budget(deadline=0.0)  # no time for another one
    search.run(ranking)
    assert set(search.told) == set(told) and set(search.texts) == found


def test_what_a_first_search_leaves_open_is_kept_where_no_time_is_left(tiny_gpt2: LanguageModel) -> None:
    update, _ = play_locally(tiny_gpt2, TEXTS, config=FOUR, training=TRAINING)
    evidence = evidence_of(tiny_gpt2, update)
    for spent in (False, True):
        search, _ = searching(tiny_gpt2, update)
        search.last = LastBlock(search.last.adapter, {})  # tells no end
        search.budget = Budget(stop=lambda search=search, spent=spent: spent and bool(search.texts))
        assert not searched(evidence, search, 1, last=False)
        assert bool(search.texts) is spent


@every("tiny_gpt2", "tiny_llama")
def test_a_text_with_a_token_wrong_missing_or_too_many_is_mended(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(model, update)
    mender = Mender(ranking, search.last, search.candidates, search.budget)
    texts = list(truth.sequences)
    stray = texts[0][2]
    damaged = [
        *(text[:2] + text[3:] for text in texts),
        *((*text[:2], text[0], *text[2:]) for text in texts),
        *((*text[:2], stray, *text[3:]) for text in texts),
    ]
    mended = mender.mended([*texts, *damaged])
    assert [each.text for each in mended] == texts * 4
    assert all(each.told for each in mended)
    assert all(search.last.singles_out(text) for text in texts)
    assert not any(search.last.singles_out((*text, text[1])) for text in texts)
    assert all(search.last.misfits([text[:1]]) > search.last.misfits([text]) for text in texts)
    late = Mender(ranking, search.last, search.candidates, Budget(deadline=0.0))
    assert [each.text for each in late.mended(texts)] == texts
    assert next(each.text for each in late.mended(damaged[:1])) not in texts


@every("tiny_gpt2", "tiny_llama")
def test_a_text_with_two_wrong_tokens_is_mended_wherever_they_stand(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(model, update)
    mender = Mender(ranking, search.last, search.candidates, search.budget, thorough=True)
    texts = list(truth.sequences)
    twice = [(*text[:1], *text[2:], text[0]) for text in texts]  # one is missing, and one is too many
    with varied(seen_misfit=math.inf):  # however badly a damaged text fits
        assert [each.text for each in mender.mended([*texts, *twice])] == texts * 2


class Deaf(LastBlock):
    """A last block in which so much drifted that all texts fit alike."""

    def misfits(self, texts: Sequence[Prefix]) -> list[float]:
        """The same for all."""
        return [0.1] * len(texts)


@dataclass(frozen=True)
class _Asked(LastBlock):
    """A last block that notes which texts it is asked of."""

    asked: list[Prefix]

    def misfits(self, texts: Sequence[Prefix]) -> list[float]:
        """As they are."""
        self.asked.extend(texts)
        return super().misfits(texts)


@every("tiny_gpt2", "tiny_llama")
def test_rows_mend_a_text_where_the_last_block_tells_nothing(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(model, update)
    deaf = Deaf(search.last.adapter, search.last.spans)
    mender = Mender(ranking, deaf, search.candidates, search.budget, thorough=True)
    texts = list(truth.sequences)
    wrong = [(*text[:2], texts[index - 1][2], *text[3:]) for index, text in enumerate(texts)]
    assert [each.text for each in mender.mended(texts)] == texts
    assert [each.text for each in mender.mended(wrong)] == texts


def test_what_was_mended_takes_the_place_of_the_text_that_it_was(tiny_llama: LanguageModel) -> None:
    update, truth = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(tiny_llama, update)
    search.run(ranking)
    text = max(search.told, key=len)
    wrong = search.paths.replaced(search.texts[0], (*text[:2], text[0], *text[2:]))
    search.texts.append(wrong)
    assert search.told.count(text) == 1
    search.mend(Mender(ranking, search.last, search.candidates, search.budget))
    assert search.told.count(text) == 1 and wrong not in search.texts
    assert set(search.told) <= set(truth.sequences)


def test_what_only_repeats_its_tokens_is_dropped_and_not_mended(tiny_llama: LanguageModel) -> None:
    update, truth = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(tiny_llama, update)
    search.run(ranking)
    search.mend(Mender(ranking, search.last, search.candidates, search.budget))
    before, begun = search.texts, truth.sequences[0][:2]
    search.texts = [*before, search.paths.replaced(before[0], begun * 5)]
    asked: list[Prefix] = []
    search.last = _Asked(search.last.adapter, search.last.spans, asked)
    search.mend(Mender(ranking, search.last, search.candidates, search.budget, thorough=True))
    assert search.texts == before
    assert {each for each in asked if len(each) > 8} == {(begun * 5)[:9], begun * 5}  # none of its neighbours


@dataclass(frozen=True)
class _Known(LastBlock):
    """A last block that knows how badly some texts fit; others fit as nothing does."""

    misfit: dict[Prefix, float]

    def misfits(self, texts: Sequence[Prefix]) -> list[float]:
        """As they are known."""
        return [self.misfit.get(text, 1.5) for text in texts]


def test_a_text_that_fits_far_worse_than_the_others_is_not_told(tiny_llama: LanguageModel) -> None:
    update, truth = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(tiny_llama, update)
    search.paths.rows.append(Row(None, 0, (0,), 0, 5.0, 5.0, strong=True, weak=0, doubtful=False))
    search.texts = [search.paths.replaced(0, text) for text in truth.sequences]
    misfit = dict(zip(truth.sequences, (-0.2, 0.0, 0.7, 0.1), strict=True))
    last = _Known(search.last.adapter, search.last.spans, misfit)
    late = Mender(ranking, last, search.candidates, Budget(deadline=0.0))
    assert [each.told for each in late.mended(truth.sequences)] == [True] * 4
    assert not search.mend(late)
    assert search.untold == [truth.sequences[2]] and len(search.told) == 3


@pytest.mark.parametrize("tail", [0, 4])
def test_an_end_that_is_seen_is_kept_but_not_told_unless_another_text_ends_so(
    tiny_llama: LanguageModel, tail: int
) -> None:
    update, truth = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(tiny_llama, update)
    search.paths.rows.append(Row(None, 0, (0,), 0, 5.0, 5.0, strong=True, weak=0, doubtful=False))
    *told, other = truth.sequences
    wrong = (*other[:3], *told[0][-tail:]) if tail else other[:-1]
    search.texts = [search.paths.replaced(0, text) for text in (*told, wrong)]
    misfit = {**dict.fromkeys(told, -0.5), wrong: 0.3}  # worse than the others, by more than a told one may
    search.mend(
        Mender(ranking, _Known(search.last.adapter, search.last.spans, misfit), search.candidates, Budget(deadline=0.0))
    )
    assert (search.told, search.untold) == (told, [wrong])
    assert (search.texts[-1] in search.ends) is (tail == 0)
    search.run(ranking)
    assert (wrong in search.known) is (tail == 0) and set(told) <= set(search.known)


@given(st.lists(st.floats(-2, 0.7), min_size=1, max_size=9), st.floats(-2, 2))
def test_how_badly_an_end_may_fit_is_told_by_the_others(misfits: list[float], other: float) -> None:
    ends, usual = SeenEnds(), statistics.median(misfits)
    for row, misfit in enumerate(misfits):
        ends.add(row, misfit, told=True)
    rows = range(len(misfits) + 1)
    most, seen = ends.limits(rows)
    assert most == pytest.approx(usual + 0.5) and usual < seen <= 0.9
    ends.add(len(misfits), other, told=False)
    assert ends.limits(rows) == (most, seen)  # a text in doubt sets no limit
    ends.doubt(rows)
    assert set(ends) == {row for row, misfit in enumerate([*misfits, other]) if misfit <= max(most, seen)}
    assert ends.told(rows) == [row for row, misfit in enumerate(misfits) if misfit <= most]


@every("tiny_gpt2", "tiny_llama")
def test_most_neighbours_of_a_text_are_none_that_only_go_on(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(model, update)
    texts = truth.sequences
    for thorough, most in ((False, 8), (True, 32)):
        found = nearby(ranking, search.candidates, [*map(Draft, texts)], search.budget, thorough=thorough)
        pairs = list(zip(texts, found, strict=True))
        longer = [sum(other[: len(text)] == text for other in near.gains) for text, near in pairs]
        assert 0 < max(longer) <= most // 4  # behind the longest text of a batch there is nothing
        assert all(len(near.gains) <= most for near in found)


@every("tiny_gpt2", "tiny_llama")
def test_several_tokens_that_a_text_leaves_out_are_put_back_at_once(model: LanguageModel) -> None:
    update, truth = play_locally(model, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(model, update)
    for text in truth.sequences:
        missing = frozenset(text[2:5])
        for thorough in (True, False):
            cut = Draft((*text[:2], *text[5:]))
            (near,) = nearby(ranking, search.candidates, [cut], search.budget, thorough=thorough, unheld=missing)
            assert (text in near.gains) is thorough


def test_a_string_of_weak_rows_is_no_text(tiny_llama: LanguageModel) -> None:
    update, _ = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, ranking = searching(tiny_llama, update)
    search.run(ranking)
    usual = statistics.median(search.paths.mean(end) for end in search.texts if end in search.ends)
    weak = [end for end in search.texts if search.paths.mean(end) < 0.9 * usual]
    assert weak
    again, ranking = searching(tiny_llama, update)
    with varied(weak_text=0.9):
        again.run(ranking)
    assert len(again.texts) == len(search.texts) - len(weak)


SHORT = st.lists(st.integers(0, 2), max_size=10).map(tuple)


@given(SHORT, st.integers(0, 2), SHORT)
def test_what_a_text_says_again(text: tuple[int, ...], token: int, other: tuple[int, ...]) -> None:
    grown = bytes((*text, token))
    again = len(grown) >= 3 and grown[-3:] in bytes(text)
    assert said_again([(), text], [0, 1], [token, token]) == [False, again]
    again = again or (len(grown) >= 4 and grown[-4:] in bytes(other))
    assert said_again([(), text], [0, 1], [token, token], [(), other]) == [False, again]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_a_text_repeats_if_most_of_it_can_go_and_no_token_is_lost(text: list[int]) -> None:
    left = list(text)
    for token in text:
        if left.count(token) > 1:
            left.remove(token)
    assert repeats(text) is (len(text) - len(left) > len(left))


def _grown(paths: Paths, text: str, evidence: float) -> int:
    """The last row of a text of letters, each with so much evidence."""
    before = None
    for place, letter in enumerate(text):
        paths.rows.append(
            Row(before, ord(letter), (ord(text[0]),), place, evidence, evidence * (place + 1), True, 0, False)
        )
        before = len(paths.rows) - 1
    assert before is not None
    return before


def test_a_string_that_is_too_weak_for_a_text_takes_none_along(tiny_llama: LanguageModel) -> None:
    update, _ = play_locally(tiny_llama, TEXTS, config=FOUR, training=TRAINING)
    search, search.ranking = searching(tiny_llama, update)
    search.last = LastBlock(search.last.adapter, {})  # tells no end
    told = _grown(search.paths, "abcdef", 10.0)
    search.texts = [told]
    search.ends.add(told, 0.0, told=True)
    weak = _grown(search.paths, "xabcdef" + "ghijklmnopqrstuvwyzABCDEFGHIJKLMNOPQRSTUVWXYZ", 2.9)  # has all its rows
    assert search._unexplained(set()) == [told]
    with varied(weak_text=0.2):
        assert search._unexplained(set()) == [weak]


@pytest.mark.parametrize("prompt", ["", "prompt:"])
def test_a_text_put_together_from_others_has_no_rows_of_its_own(prompt: str) -> None:
    paths = Paths()
    letters = ("abcdefgh", "ijklmnop", "ajclengp", "xijklmno", "xyzuvwgh")
    first, second, mixed, late, own = (_grown(paths, prompt + text, 5.0) for text in letters)
    order = [first, second, mixed, late, own]
    learned = unexplained(paths, order, rotary=False, prompted=len(prompt))
    assert learned == [first, second, own]  # rows at the same places, or behind the same tokens
    assert unexplained(paths, order, rotary=True, prompted=len(prompt)) == [first, second, mixed, own]
    assert unexplained(paths, [mixed, first, second], rotary=False, prompted=len(prompt)) == [mixed, first, second]
    weak = _grown(paths, prompt + "abcdmnop", 2.0)
    early = [first, mixed, second, weak]
    assert unexplained(paths, early, rotary=False, prompted=len(prompt), clearly=2.0) == [first, mixed, second]
    assert unexplained(paths, [own], rotary=True, prompted=len(prompt), least=41.0) == []


def test_on_its_way_through_the_prompt_a_text_is_not_given_up() -> None:
    paths = Paths()
    begun = _grown(paths, "pro", 5.0)
    assert unexplained(paths, [begun], rotary=False, prompted=7, clearly=2.0) == [begun]
    assert unexplained(paths, [begun], rotary=False, prompted=7, least=1.0) == []  # nor is it one that was found


def test_a_beginning_keeps_what_is_hardly_behind_its_best() -> None:
    paths = Paths()
    ends = [_grown(paths, text, evidence) for text, evidence in (("abcdef", 9.0), ("abxyzw", 2.0), ("abcdeg", 8.5))]
    leaves = [paths.rows[end] for end in ends]
    made = [replace(row, root=paths.tokens(end)[:4]) for row, end in zip(leaves, ends, strict=True)]
    near = replace(made[0], token=ord("h"), total=made[0].total - 0.5 * 9)
    far = replace(made[0], token=ord("i"), total=made[0].total - 0.7 * 9)
    made += [near, far]
    order = sorted(range(len(made)), key=lambda index: -made[index].total)
    assert constants().behind == 0.6
    assert going_on(paths, made, order, set()) == [0, 2, 3, 1]  # the weak text's beginning is another
    told = [paths.text(made[0])]
    with varied(rivals=1):
        assert going_on(paths, made, order, set(), told) == [0, 2, 1]  # beside a known text one that begins as it does
    with varied(rivals_left=1):
        assert going_on(paths, made, order, set(), [(0, 0)]) == [0, 1]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=6))
def test_the_longest_beginning_that_any_two_texts_share(texts: list[tuple[int, ...]]) -> None:
    pairs = itertools.combinations(set(texts), 2)
    equal = [list(itertools.takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False))) for pair in pairs]
    assert shared(texts) == max(map(len, equal), default=0)


@pytest.mark.parametrize(
    ("text", "turns"),
    [("abcdabc", False), ("abcdabcd", True), ("aaaa", False), ("aaaaa", True), ("abcabc", False), ("abcabca", True),
     ("abcdefabcde", False), ("abcdefabcdef", True), ("xabcdefabcdefy", False), ("abbabaabbbabaaba", False),
     ("abbabaabbbabaababbba", True), ("abcdefgh" + "badcfehg", False),
     ("abcdefghijklmnop" + "cdefgh" + "bcdef" + "jklmno", True),
     ("abcdefghijklmnop" + "cde" + "bcd" + "jkl" + "ef" + "abc" + "no", True),
     ("abcdefghijklmnop" + "cde" + "bcd" + "jkl" + "ef" + "abc" + "n", False)],
)  # fmt: skip
def test_only_what_repeats_as_a_whole_goes_round_in_a_circle(text: str, *, turns: bool) -> None:
    assert constants().alike == 4
    assert circular([ord(token) for token in text]) is turns
