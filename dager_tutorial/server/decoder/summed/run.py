"""The search where the rank is full, from an update's evidence to a tree of likely prefixes (chapter `11_limits`).

The server first learns on a simulated batch what the evidence of each tap is worth, then grows prefixes by it. What
the last block has rows of are whole texts; the caller looks at them once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.passage import Passage, Prefix
from dager_tutorial.server.decoder.summed.search import Found, Goal, SummedSearch
from dager_tutorial.server.decoder.summed.sketch import Sketch
from dager_tutorial.server.decoder.summed.spectra import spectra_of, summed_taps
from dager_tutorial.server.decoder.summed.weighing import judges
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates


def likely_prefixes(
    evidence: Evidence, adapter: DecoderAdapter, candidates: Candidates, last: Mapping[Tap, Span], budget: Budget
) -> Tree:
    """Search by the summed evidence of all taps.

    Args:
        evidence: The update's gradients, or what is left of them.
        adapter: The architecture.
        candidates: Tokens that may stand at each position.
        last: Spans that tell where texts end, none where every token carries a loss.
        budget: What the search may cost.

    Returns:
        Every prefix at which the last block has a row, and the likeliest others, with those on the way to them.
    """
    taps = summed_taps(evidence, adapter, list(last), budget)
    if not taps:
        return Tree()
    texts = max((span.rank for span in last.values()), default=constants().simulated_texts)
    search = _search(evidence, adapter, candidates, taps, last, budget, texts)
    room = texts if last else constants().widest
    return _tree(search.run(), room, rotary=candidates.every_position)


def _search(
    evidence: Evidence,
    adapter: DecoderAdapter,
    candidates: Candidates,
    taps: Sequence[Tap],
    last: Mapping[Tap, Span],
    budget: Budget,
    texts: int,
) -> SummedSearch:
    """The search, with what it has learnt."""
    generator = budget.generator()
    all_halves = 2 * adapter.num_blocks - 1
    stages = sorted({sum(_read(tap, halves) for tap in taps) for halves, _ in SummedSearch.stages(all_halves)} - {0})
    size = (texts, _rows(adapter, candidates, texts))
    output = adapter.tap(adapter.num_blocks - 1, ATTENTION_OUTPUT)  # not shared, it does not say that all tokens count
    learnt = judges(
        adapter, candidates, taps, stages, size, generator, ends=bool(last) or evidence.span(output) is None
    )
    spectra = spectra_of(evidence, taps)
    block = (adapter.tap(0, MLP), adapter.tap(0, ATTENTION_OUTPUT))
    sketch = Sketch.of(adapter, spectra[block[0]], spectra[block[1]], generator) if set(block) <= set(spectra) else None
    goal = Goal(last.get(output), texts, 3 * size[1] // texts)
    readers = {tap: each.log_shares for tap, each in spectra.items()}
    return SummedSearch(Passage(adapter, readers, budget), learnt, sketch, goal, candidates, budget)


def _read(tap: Tap, halves: int) -> bool:
    """Whether a tap is read within so many half blocks."""
    return (2 * tap.block if tap.kind == QKV else 2 * tap.block + 1) <= halves


def _rows(adapter: DecoderAdapter, candidates: Candidates, texts: int) -> int:
    """About how many rows the batch has: more than fill the width, no more than its longest text allows."""
    least = round(constants().simulated_rows * adapter.hidden_size)
    if candidates.every_position:
        return least
    most = texts * len(candidates.tokens)
    return min(max(least, round(constants().usual_length * most)), most)


def _tree(found: Found, room: int, *, rotary: bool) -> Tree:
    """The ends and the likeliest other prefixes that nothing extends, as a tree."""
    inner = {prefix[:-1] for prefix in found.grown}
    open_ends = [prefix for prefix in found.grown if prefix not in inner and prefix not in found.ends]
    likeliest = sorted(open_ends, key=lambda prefix: -len(prefix))[: max(0, room - len(found.ends))]
    tree, nodes = Tree(), dict[Prefix, int]()
    for text in sorted([*found.ends, *likeliest], key=len):
        for end in range(1, len(text) + 1):
            prefix = text[:end]
            if prefix not in nodes:
                ratio = 1.0 + torch.tensor(-found.grown.get(prefix, 0.0)).exp().item()
                parent = nodes.get(prefix[:-1])
                nodes[prefix] = tree.grow(parent, prefix[-1], start=0, ratio=ratio, rotary=rotary)
    return tree
