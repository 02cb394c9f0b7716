"""The rows of the last block's MLP output map, and what a token's loss sends back to each.

Behind that map every row goes its own way to the decoder: a residual, norms, in masked language models a transform.
So the loss's gradient at the map's output is, row by row, `u_i = sum_t c_i(t) phi_i(t) / N`: `c_i(t)` counts the
targets t of row i, N those of the batch, and `phi_i(t) = J_i^T W^T (p_i - e_t)` with the Jacobian J_i of that way, the
decoder's weights W and the probabilities p_i. The server computes phi for whatever token it likes.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.tap import MLP_OUTPUT, precise
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.constants import constants
from dager_tutorial.server.passes import parts_of


class Place(NamedTuple):
    """Where a row is computed: the index of a text, and a position in it."""

    text: int
    position: int


@dataclass(frozen=True)
class OutputRows:
    """Rows of the last MLP output map, with their ways to the decoder.

    Attributes:
        inputs: float64, what enters the map.
        means: float64, the decoder's weights averaged with the probabilities of the tokens.
        likely: int64, each row's likeliest token.
        weights: The decoder's weights.
        hidden: What enters the decoder, with its graph, which begins at `leaves`.
        leaves: The map's outputs, part by part (texts x length x width).
        where: Of each part the texts and positions that are rows, in order.
        order: int64, where each row stands among those.
    """

    inputs: Float[Tensor, "rows inner"]
    means: Float[Tensor, "rows hidden"]
    likely: Int[Tensor, " rows"]
    weights: Float[Tensor, "tokens hidden"]
    hidden: Float[Tensor, "rows hidden"]
    leaves: tuple[Tensor, ...]
    where: tuple[tuple[Tensor, Tensor], ...]
    order: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.inputs)

    def pulled(self, vectors: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows width"]:
        """`J_i^T v_i` (float64) of one vector a row, by one backward pass."""
        with torch.enable_grad():
            back = torch.autograd.grad(self.hidden, self.leaves, vectors.to(self.hidden), retain_graph=True)
        return precise(self._rows(back)).cpu()

    def pushed(self, vectors: Float[Tensor, "rows width"]) -> Float[Tensor, "rows hidden"]:
        """`J_i v_i` (float64) of one vector a row: the derivative of `pulled`, which is linear."""
        with torch.enable_grad():
            probe = torch.zeros_like(self.hidden, requires_grad=True)
            back = torch.autograd.grad(self.hidden, self.leaves, probe, create_graph=True)
            (found,) = torch.autograd.grad(self._rows(back), probe, vectors.to(self.hidden))
        return precise(found).cpu()

    def slopes(self, rows: Int[Tensor, " pairs"], tokens: Int[Tensor, " pairs"]) -> Float[Tensor, "pairs width"]:
        """`phi_i(t)` (float64) of pairs of a row and a token.

        Args:
            rows: int64.
            tokens: int64.
        """
        found: Tensor | None = None
        for turn in _turns(rows):
            vectors = torch.zeros_like(self.means)
            vectors[rows[turn]] = self.means[rows[turn]] - self._embedded(tokens[turn])
            pulled = self.pulled(vectors)[rows[turn]]
            found = pulled.new_zeros(len(rows), pulled.shape[1]) if found is None else found
            found[turn] = pulled
        return self.means.new_zeros(0, self.leaves[0].shape[-1]) if found is None else found

    def likeliest(
        self, rows: Int[Tensor, " some"], rests: Float[Tensor, "some width"], count: int
    ) -> Int[Tensor, "some count"]:
        """Tokens whose phi points most along what is left of some rows' gradients, as far as a screen tells.

        `<phi_i(t), r> = <W^T (p_i - e_t), J_i r>` is exact; for the length of phi that of `W^T (p_i - e_t)` stands in.

        Args:
            rows: int64, none twice.
            rests: float64.
            count: How many tokens.
        """
        vectors = rests.new_zeros(len(self), rests.shape[1])
        vectors[rows] = rests
        along = self.pushed(vectors)[rows].to(self.weights)
        means = self.means[rows].to(self.weights)
        squares, size = self.weights.square().sum(1), constants().rows_compared_at_once
        found = []
        for push, mean in zip(along.split(size), means.split(size), strict=True):
            products = (push * mean).sum(1, keepdim=True) - push @ self.weights.T
            lengths = squares - 2 * mean @ self.weights.T + mean.square().sum(1, keepdim=True)
            found.append(
                (at_least_float32(products) / at_least_float32(lengths).clamp(min=1e-12).sqrt()).topk(count).indices
            )
        return torch.cat(found).cpu()

    def _rows(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows among tensors of the leaves' shapes."""
        return torch.cat([part[place] for part, place in zip(parts, self.where, strict=True)])[self.order]

    def _embedded(self, tokens: Tensor) -> Tensor:
        """The decoder's weights of tokens, float64."""
        return precise(self.weights[tokens.to(self.weights.device)]).cpu()


def output_rows(simulator: Simulator, texts: Sequence[Ids], places: Sequence[Place]) -> OutputRows:
    """Compute rows by the unmodified forward pass.

    Args:
        simulator: The client's network.
        texts: Token ids as the network sees them.
        places: Which rows, each once, at least one.
    """
    wanted: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        wanted.setdefault(place.text, []).append(index)
    found: list[_Part] = []
    order: list[int] = []
    for part in parts_of(simulator.network, texts):
        inside = [(at, index) for at, text in enumerate(part) for index in wanted.get(text, ())]
        if inside:
            order += [index for _, index in inside]
            where = torch.tensor([[at, places[index].position] for at, index in inside]).T
            found.append(_captured(simulator, [texts[text] for text in part], where))
    return _joined(found, simulator.network, torch.tensor(order).argsort())


def _joined(found: Sequence[_Part], network: PreTrainedModel, order: Tensor) -> OutputRows:
    """The rows of all parts, in another order."""
    inputs, means, likely, hidden = (
        torch.cat([getattr(each, name) for each in found])[order] for name in ("inputs", "means", "likely", "hidden")
    )
    weights = network.get_output_embeddings().weight.detach()
    leaves, where = tuple(each.leaf for each in found), tuple(each.where for each in found)
    return OutputRows(inputs, means, likely, weights, hidden, leaves, where, order)


class _Part(NamedTuple):
    """The rows of some texts; fields as in `OutputRows`."""

    inputs: Tensor
    means: Tensor
    likely: Tensor
    hidden: Tensor
    leaf: Tensor
    where: tuple[Tensor, Tensor]


def _captured(simulator: Simulator, texts: list[Ids], inside: Tensor) -> _Part:
    """One forward pass whose graph is nothing but the way from the map's output to the decoder."""
    before_decoder: list[Tensor] = []

    def end(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Let the graph end before the decoder: no vocabulary is ever in it."""
        before_decoder.append(args[0])
        return (args[0].detach(),)

    adapter, decoder = simulator.adapter, simulator.network.get_output_embeddings()
    handle = decoder.register_forward_pre_hook(end)
    try:
        with simulator.cut_behind(adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT)) as seen:
            logits, _ = simulator.logits(texts)
            at, positions = inside.to(logits.device)
            where = at, positions
            hidden = before_decoder[0][where]
    finally:
        handle.remove()
    chances = at_least_float32(logits.detach()[where]).softmax(-1)
    means = precise(chances @ decoder.weight.detach().to(chances)).cpu()
    inputs = precise(seen["inputs"].detach()[where]).cpu()
    return _Part(inputs, means, chances.argmax(-1).cpu(), hidden, seen["output"], where)


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in float32, where it has fewer digits, as transformers computes losses.

    Args:
        tensor: Of any floating type.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _turns(rows: Tensor) -> Iterator[Tensor]:
    """Places of pairs, such that no turn has a row twice."""
    seen: Counter[int] = Counter()
    turns: list[list[int]] = []
    for place, row in enumerate(rows.tolist()):
        if seen[row] == len(turns):
            turns.append([])
        turns[seen[row]].append(place)
        seen[row] += 1
    yield from map(torch.tensor, turns)
