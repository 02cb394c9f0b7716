"""The parts of the encoder search one by one: clues, seeds, relaxation, polish and confirmation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers import friends
from torch import Tensor

from dager_tutorial.client.batch import encode
from dager_tutorial.client.step import client_update
from dager_tutorial.models.adapter import EncoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, QKV
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.encoder.confirmation import Confirmer
from dager_tutorial.server.encoder.polish import Polish
from dager_tutorial.server.encoder.relaxation import Beginning, Relaxation, grown
from dager_tutorial.server.encoder.search import TextSearch
from dager_tutorial.server.encoder.seeds import Seed, by_company, companions, known_tokens, overlapping
from dager_tutorial.server.encoder.tables import Clues, FirstBlock, Text, clues_of, first_block
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates, filter_tokens
from dager_tutorial.server.unmixing import Incidence

Draw = Callable[..., list[str]]


class Parts(NamedTuple):
    """The tables of a batch, the true texts as indices, and what tests them."""

    clues: Clues
    block: FirstBlock
    confirmer: Confirmer
    texts: list[Text]


@pytest.fixture(scope="module")
def parts(tiny_bert: LanguageModel, random_texts: Draw) -> Parts:
    """Three texts of six words, as a server sees them that knows where nothing stands."""
    batch = random_texts(3, 4, 6, 6)
    evidence = evidence_of(tiny_bert, client_update(tiny_bert, batch))
    adapter = evidence.adapter
    assert isinstance(adapter, EncoderAdapter)
    first, span, deeper = (evidence.span(adapter.tap(*place)) for place in ((0, QKV), (0, ATTENTION_OUTPUT), (1, QKV)))
    assert first is not None and span is not None and deeper is not None
    clues = clues_of(filter_tokens(adapter.first_input, first))
    block = first_block(adapter, clues.tokens, len(clues.wide), span)
    ids = clues.tokens.tolist()
    texts = [tuple(ids.index(token) for token in text) for text in encode(tiny_bert.tokenizer, batch)]
    return Parts(clues, block, Confirmer(adapter, tuple(ids), block, span, {adapter.tap(1, QKV): deeper}), texts)


def changed(parts: Parts, text: Text, *places: int) -> Text:
    """The text with another candidate at some places."""
    other = {
        place: next(t for t in parts.clues.wide[place].nonzero()[:, 0].tolist() if t != text[place]) for place in places
    }
    return tuple(other.get(place, token) for place, token in enumerate(text))


# ---- clues and seeds


def test_clues_put_the_surest_pair_first() -> None:
    """In the order of the log-odds, without position 0; a token that stands once is not likely elsewhere."""
    candidates = Candidates((torch.tensor([3]), torch.tensor([5, 9]), torch.tensor([5, 9])), every_position=False)
    coefficients = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.3, 0.9], [0.0, 0.4, 0.01]], dtype=torch.float64)
    where = Incidence(coefficients, torch.full((3,), 0.1, dtype=torch.float64))
    clues = clues_of(candidates, where)
    assert clues.order == ((1, 2), (2, 1), (1, 1), (2, 2))
    assert clues.wide.tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    assert clues.likely.tolist() == [[True, False, False], [False, True, True], [False, True, False]]
    assert not clues.together.any()


def planted(together: Tensor, places: list[int]) -> Clues:
    """Clues of tokens each of which surely stands at one place; token 0 begins every text."""
    coefficients = torch.nn.functional.one_hot(torch.tensor(places)).T.double()
    wide = coefficients > 0
    return Clues(torch.arange(len(places)), wide, wide, coefficients, (), together)


def test_companions_leave_out_what_may_be_a_mistake() -> None:
    """One that is the mate of few others, and two that would stand at one place."""
    clues = planted(friends(7, [1, 2, 3, 4]), [0, 1, 2, 3, 4, 5, 4])
    assert companions(clues, Seed(1, 1)) == {2: 2, 3: 3, 4: 4}
    lonely = clues.together.clone()
    lonely[1, 5] = lonely[5, 1] = True
    assert companions(planted(lonely, [0, 1, 2, 3, 4, 5, 4]), Seed(1, 1)) == {2: 2, 3: 3, 4: 4}
    twice = friends(7, [1, 2, 3, 4, 6])
    assert companions(planted(twice, [0, 1, 2, 3, 4, 5, 4]), Seed(1, 1)) == {2: 2, 3: 3}
    assert companions(clues, Seed(5, 5)) == {}
    assert known_tokens(clues, Seed(5, 5)) == {0: 0, 1: 1, 2: 2, 3: 3, 5: 5}  # two tokens may stand at position 4


def test_seeds_with_most_companions_come_first_and_no_company_twice() -> None:
    """A group of four before one of two, one seed of each; a part of a company is asked only where it must be."""
    together = friends(7, [4, 5], [1, 2, 3, 6])
    clues = planted(together, [0, 1, 2, 3, 4, 5, 6])
    assert [seed.token for seed in by_company(clues, operator.eq)] == [1, 4]
    together[1, 6] = together[6, 1] = False  # now 2 and 3 have all four, 1 and 6 three each
    assert [seed.token for seed in by_company(clues, operator.eq)] == [2, 1, 6, 4]
    assert [seed.token for seed in by_company(clues, operator.le)] == [2, 4]
    assert list(by_company(planted(friends(3), [0, 1, 2]), operator.le)) == []


def test_overlapping_seeds_forbid_every_other_pair_of_a_text() -> None:
    """Never the seed itself and never what begins the text."""
    seeds = list(overlapping([(0, 5, 6, 7), (0, 5)]))
    assert {seed.forbidden for seed in seeds} == {(1, 5), (2, 6), (3, 7)}
    assert all(seed.pair != seed.forbidden and (0, 5, 6, 7)[seed.position] == seed.token for seed in seeds)
    assert len(seeds) == len(set(seeds)) == 6


# ---- relaxation


def relaxation(parts: Parts, seed: int = 0, **limits: float) -> Relaxation:
    return Relaxation(parts.block, torch.Generator().manual_seed(seed), Budget(**limits))


def test_the_relaxation_names_the_text_of_a_known_token(parts: Parts) -> None:
    """From the frame's first token and one word of each text; without the truth among the candidates, another text."""
    for text in parts.texts:
        beginning = Beginning({0: text[0], 3: text[3]}, parts.clues.wide, parts.clues.wide)
        found = grown(
            relaxation(parts), beginning, 480, 3, lambda each: each if parts.confirmer.confirms(each) else None
        )
        assert found == text
        without = beginning.without((5, text[5]))
        solution = relaxation(parts).solve(without, 480)
        assert solution is not None and solution.text[3] == text[3] and solution.text[5:6] != text[5:6]


def test_the_relaxation_keeps_to_its_memory(parts: Parts) -> None:
    """Fewer equations where memory is short, none where they would not decide; the same answer at every run."""
    beginning = Beginning({0: parts.texts[0][0], 3: parts.texts[0][3]}, parts.clues.wide, parts.clues.wide)
    solutions = [relaxation(parts).solve(beginning, 480) for _ in range(2)]
    assert solutions[0] == solutions[1] is not None
    assert relaxation(parts, memory=2**10).solve(beginning, 480) is None


def test_growing_ends_with_the_time(parts: Parts) -> None:
    """Past the deadline no second round is begun, although the first one settled something."""
    text = parts.texts[0]
    asked = []
    beginning = Beginning({0: text[0], 3: text[3]}, parts.clues.wide, parts.clues.wide)
    first = relaxation(parts).solve(beginning, 480)
    assert first is not None and beginning.after(first) is not None
    late = relaxation(parts, deadline=0.0)
    assert grown(late, beginning, 480, 3, lambda each: asked.append(each), first) is None
    assert asked == [first.text]


def test_a_seed_never_leads_to_what_it_forbids(parts: Parts) -> None:
    """Alone it leads to its text; where one other pair of that text is forbidden, to none."""
    search = TextSearch(parts.clues, parts.confirmer, relaxation(parts), None, None, Budget())
    for text in parts.texts:
        assert search.alone(Seed(3, text[3])) == text
        assert search.alone(Seed(3, text[3], forbidden=(5, text[5]))) is None


# ---- polish


def steep_block(positions: int, tokens: int, heads: int, width: int, largest: float) -> FirstBlock:
    """Random queries, keys and values whose largest score is `largest`, of either sign."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(positions, tokens, heads, width, generator=draw) for _ in range(3))
    products = torch.einsum("pthw,qshw->ptqsh", query, key)
    inputs = heads * width
    directions = torch.linalg.qr(torch.randn(inputs, inputs, generator=draw, dtype=torch.float64)).Q
    span = Span.cut(directions, torch.ones(inputs, dtype=torch.float64), inputs - 10, outputs=2 * inputs)
    return FirstBlock(query * (largest / float(products.abs().max())), key, value, 1.0, span)


def oracle(block: FirstBlock, directions: Tensor, text: Text) -> tuple[float, float, float]:
    """What a text's rows leave outside, in float64 by the whole text's softmax; the least and the largest score."""
    query, key, value = (part.double() for part in block.rows(text))
    products = torch.einsum("qhw,khw->hqk", query, key) * block.scaling
    rows = torch.einsum("hqk,khw->qhw", products.softmax(-1), value).flatten(1)
    left = (rows @ directions.double().flatten(0, 1)).square().sum()
    return float(left), float(products.min()), float(products.max())


@pytest.mark.parametrize("largest", [3.0, 300.0])
@pytest.mark.parametrize("memory", [2**29, 1])
def test_the_polish_measures_what_a_slow_oracle_measures(largest: float, memory: int) -> None:
    """At scores of 300, too, whose exponentials no float32 holds; all choices at once, or one by one."""
    block = steep_block(5, 20, 2, 8, largest)
    directions = block.mixture(6, torch.Generator().manual_seed(1)).float()
    polish = Polish(block, torch.ones(5, 20, dtype=torch.bool), directions, Budget(memory=memory))
    text, choices, seen = (3, 1, 4, 1, 5), torch.arange(20), []
    for place in range(5):
        asked = [oracle(block, directions, (*text[:place], choice, *text[place + 1 :])) for choice in range(20)]
        expected = torch.tensor([left for left, _, _ in asked])
        assert torch.allclose(polish.energies(text, place, choices), expected, rtol=2e-3)
        seen += [score for _, *both in asked for score in both]
    assert min(seen) < -0.5 * largest and max(seen) > 0.5 * largest


def test_the_polish_mends_a_text(parts: Parts) -> None:
    """One wrong word, wherever it stands, and a true text stays as it is; of two wrong ones it finds to a true text."""
    directions = parts.block.mixture(48, torch.Generator().manual_seed(0)).float()
    polish = Polish(parts.block, parts.clues.wide, directions, Budget())
    for text in parts.texts:
        assert polish.polished(text) == text
        for place in range(1, 7):
            assert polish.polished(changed(parts, text, place)) == text
        for places in ((1, 5), (3, 4), (2, 6)):
            assert polish.polished(changed(parts, text, *places)) in parts.texts


# ---- confirmation


def test_only_true_texts_are_confirmed(parts: Parts) -> None:
    """Not with another token anywhere, not cut short, not in another order, and not nothing."""
    for text in parts.texts:
        assert parts.confirmer.confirms(text)
        assert float(parts.confirmer.ratios(text).max()) < parts.confirmer.span.bound
        wrong = [changed(parts, text, place) for place in range(1, len(text)) if int(parts.clues.wide[place].sum()) > 1]
        assert len(wrong) >= 6
        cut = [text[:length] for length in range(len(text))]
        for other in [*wrong, *cut, (text[0], text[2], text[1], *text[3:])]:
            assert not parts.confirmer.confirms(other)


def test_what_passes_a_span_taken_too_large_is_refused_by_a_deeper_one(parts: Parts) -> None:
    """A rank too high forgives much in block 0: texts with a wrong word pass there. In block 1 they do not."""
    span = parts.confirmer.span
    wider = Span.cut(span.directions, span.singular_values, span.rank + 10, span.outputs, span.arithmetic)
    lenient = replace(parts.confirmer, span=wider)
    shallow = replace(lenient, deeper={})
    wrong = [changed(parts, text, place) for text in parts.texts for place in range(1, 7)]
    assert any(shallow.confirms(text) for text in wrong)
    assert not any(lenient.confirms(text) for text in wrong)
    assert all(lenient.confirms(text) for text in parts.texts)


def test_the_ratios_are_those_of_the_network(parts: Parts) -> None:
    """Block 0's rows, put together from the tables, leave outside what the model's own rows leave."""
    adapter, text = parts.confirmer.adapter, changed(parts, parts.texts[0], 3)
    tap = adapter.tap(0, ATTENTION_OUTPUT)
    ids = torch.tensor([parts.confirmer.ids(text)])
    rows = adapter.tap_inputs(ids, torch.ones_like(ids), [tap])[tap][0]
    ratios = parts.confirmer.ratios(text)
    assert float(ratios.min()) > 10 * parts.confirmer.span.bound
    assert torch.allclose(ratios, parts.confirmer.span.ratio(rows), rtol=1e-3)
