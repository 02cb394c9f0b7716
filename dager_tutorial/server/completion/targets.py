"""What a token-level loss says once all inputs are known: last tokens, texts that begin others, what masks hid.

Under the next-token loss every prefix counts the tokens that follow it. What its children in the tree of prefixes do
not use up are ends: whole texts, last token included, with their copies. Under the masked loss every position counts
the tokens that it was asked for.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from dager_tutorial.models.tap import MLP_OUTPUT
from dager_tutorial.server.completion.matching import RowTargets, row_targets
from dager_tutorial.server.completion.output_rows import Place, at_least_float32, output_rows
from dager_tutorial.server.completion.prefix_tree import PrefixTree
from dager_tutorial.server.completion.simulation import Ids, Objective, Simulator

Target = tuple[int, int]
"""A position, and the token that was asked for there."""


@dataclass(frozen=True)
class TargetCounts:
    """What a token-level loss says once all inputs are known.

    Attributes:
        texts: Distinct. Under the next-token loss whole, last token included; under the masked loss as the network saw
            them.
        copies: How often each occurs; under the masked loss at least.
        targets: Under the masked loss what was asked for in each text, as often as it was; empty under the other.
        predicted: The number of predicted tokens of the batch, or a part of it that divides all counts.
        unclear: Rows whose targets noise hides, or that several sets of texts explain equally.
    """

    texts: tuple[Ids, ...]
    copies: tuple[int, ...]
    targets: tuple[tuple[Target, ...], ...]
    predicted: int
    unclear: int

    @property
    def asked(self) -> tuple[tuple[Target, ...], ...]:
        """For each text all that was predicted in it: a token may occur more than once at a position."""
        if self.targets:
            return self.targets
        pairs = (tuple(enumerate(text[1:])) for text in self.texts)
        return tuple(one * copies for one, copies in zip(pairs, self.copies, strict=True))

    @property
    def complete(self) -> bool:
        """Whether the targets add up to the number of predicted tokens: nothing is missing."""
        return sum(map(len, self.asked)) == self.predicted


def next_token_targets(
    simulator: Simulator,
    gradients: Mapping[str, Tensor],
    leaves: Sequence[Ids],
    precision: float,
    *,
    scaled: bool = False,
) -> TargetCounts | None:
    """Whole texts from the prefixes that the network saw.

    A text of one token is no target and has none: nothing can tell of it.

    Args:
        simulator: The client's network, its head for the next token.
        gradients: By the update's names.
        leaves: Prefixes that no other extends.
        precision: Machine epsilon of the client's dtype.
        scaled: See `matching.row_targets`.

    Returns:
        None where the last MLP's output map was not shared, or there are as many rows as it has inputs.
    """
    tree = PrefixTree.of(leaves, repeats=simulator.adapter.first_input.positions is None)
    known = [tree.following[row] for row in tree.rows]
    counted = _counted(simulator, gradients, leaves, list(tree.rows.values()), known, precision, scaled)
    if counted is None:
        return None
    ends = tree.ends(
        dict(zip(tree.rows, counted.counts, strict=True)), dict(zip(tree.rows, counted.clear, strict=True))
    )
    return TargetCounts(tuple(ends.texts), tuple(ends.texts.values()), (), counted.predicted, ends.unclear)


def masked_targets(
    simulator: Simulator,
    gradients: Mapping[str, Tensor],
    texts: Sequence[Ids],
    precision: float,
    *,
    scaled: bool = False,
) -> TargetCounts | None:
    """What stood where a masked language model was asked.

    Args:
        simulator: The client's network, its head for masked tokens.
        gradients: By the update's names.
        texts: Distinct texts as the network saw them.
        precision: Machine epsilon of the client's dtype.
        scaled: See `matching.row_targets`.

    Returns:
        None where the last MLP's output map was not shared, or there are as many rows as it has inputs.
    """
    places = [Place(index, position) for index, text in enumerate(texts) for position in range(len(text))]
    counted = _counted(simulator, gradients, texts, places, [()] * len(places), precision, scaled)
    if counted is None:
        return None
    asked: list[list[Target]] = [[] for _ in texts]
    most = [0] * len(texts)
    for place, counts in zip(places, counted.counts, strict=True):
        asked[place.text] += [(place.position, token) for token, count in counts.items() for _ in range(count)]
        most[place.text] = max(most[place.text], sum(counts.values()))
    targets = tuple(map(tuple, asked))
    return TargetCounts(tuple(texts), tuple(most), targets, counted.predicted, counted.clear.count(False))


def _counted(
    simulator: Simulator,
    gradients: Mapping[str, Tensor],
    texts: Sequence[Ids],
    places: Sequence[Place],
    known: Sequence[Sequence[int]],
    precision: float,
    scaled: bool,
) -> RowTargets | None:
    """The targets of rows, in the order of the places."""
    gradient = _map_gradient(simulator, gradients)
    if gradient is None or not 0 < len(places) < len(gradient):
        return None
    rows = output_rows(simulator, texts, places)
    return row_targets(rows, gradient, known, precision, scaled=scaled)


def _map_gradient(simulator: Simulator, gradients: Mapping[str, Tensor]) -> Float[Tensor, "inner width"] | None:
    """The gradient of the last MLP's output map (float64), where it was shared."""
    adapter = simulator.adapter
    (linear,) = adapter.linear_maps(adapter.num_blocks - 1, MLP_OUTPUT)
    tap = adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT)
    own = [name for name, parameter in simulator.shared.items() if parameter is linear.weight and name in gradients]
    gradient = tap.gradient(dict(zip(tap.parameters, [gradients[name] for name in own], strict=False)))
    return None if gradient is None else gradient.T


def objective_of(counts: TargetCounts) -> Objective:
    """The client's loss on just these texts, each with all its targets: their mean over the batch.

    Args:
        counts: Texts and targets.
    """
    asked = [Counter(targets) for targets in counts.asked]

    def objective(part: list[int], logits: Tensor, mask: Tensor) -> Tensor:
        """The share of some texts."""
        wanted = [(at, *target, count) for at, text in enumerate(part) for target, count in asked[text].items()]
        rows, positions, tokens, copies = torch.tensor(wanted, device=logits.device).reshape(-1, 4).T
        losses = cross_entropy(at_least_float32(logits[rows, positions]), tokens, reduction="none")
        return (losses * copies).sum() / counts.predicted

    return objective
