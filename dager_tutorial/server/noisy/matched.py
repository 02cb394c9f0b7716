"""The matched filter: a text's own gradient, simulated, against the update that was received (chapter `14_defences`).

For white noise no statistic tells more than `S = <g(text), R> / |g(text)|`, every tensor in units of the noise on its
entries: S has the deviation 1, however many entries there are. A linear map's gradient is a sum over rows, so that
`<g, R>` and `|g|` of many texts come from what enters and leaves the maps, and no gradient of a weight is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dager_tutorial.models.tap import precise
from dager_tutorial.server.completion.simulation import Ids, Simulator
from dager_tutorial.server.passes import by_parts, parts_of


class Scores(NamedTuple):
    """What the matched filter says of some texts, each under its likeliest label.

    Attributes:
        values: float64, S.
        labels: int64.
        weights: float64, times its gradient a text best fits what was received: one over the size of the batch.
    """

    values: Float[Tensor, " texts"]
    labels: Int[Tensor, " texts"]
    weights: Float[Tensor, " texts"]


class _Part(NamedTuple):
    """A map or an embedding during a pass, what was received of its weight, and of which entries, if not of all."""

    module: nn.Module
    inputs: Tensor
    output: Tensor
    received: Tensor
    weight: float
    sent: Tensor | None = None

    def product(self, slopes: Tensor) -> Tensor:
        """For each text the inner product of its gradient and what was received."""
        if isinstance(self.module, nn.Embedding):
            return (self.received[self.inputs] * slopes).flatten(1).sum(1)
        return ((self.inputs @ self.received) * slopes).flatten(1).sum(1)

    def square(self, slopes: Tensor) -> Tensor:
        """For each text the square of its gradient: `sum_ij (x_i . x_j) (d_i . d_j)`."""
        if self.sent is not None:
            return self.weight * torch.stack([self._sent(*each) for each in zip(self.inputs, slopes, strict=True)])
        if slopes.dim() == 2:
            return self.weight * self.inputs.square().sum(1) * slopes.square().sum(1)
        if isinstance(self.module, nn.Embedding):
            alike = (self.inputs[:, :, None] == self.inputs[:, None]).to(slopes)
        else:
            alike = self.inputs @ self.inputs.transpose(1, 2)
        return self.weight * (alike * (slopes @ slopes.transpose(1, 2))).flatten(1).sum(1)

    def _sent(self, inputs: Tensor, slopes: Tensor) -> Tensor:
        """The square of a text's gradient on the entries that were sent."""
        assert self.sent is not None
        if isinstance(self.module, nn.Embedding):
            tokens, places = inputs.unique(return_inverse=True)
            rows = slopes.new_zeros(len(tokens), slopes.shape[1]).index_add_(0, places, slopes)
            return (rows.square() * self.sent[tokens]).sum()
        return ((torch.atleast_2d(inputs).T @ torch.atleast_2d(slopes)).square_() * self.sent).sum()


class Matched:
    """The filter of one update, over the maps and embeddings of which it is given gradients.

    Args:
        simulator: Repeats the client's step, of a classification.
        received: Gradients by the update's names, all or some.
        deviations: Of the noise on their entries, by the same names.
        sent: Which entries were sent, by the same names; None, of a tensor or altogether, where all were.
    """

    def __init__(
        self,
        simulator: Simulator,
        received: Mapping[str, Tensor],
        deviations: Mapping[str, float],
        sent: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        self.simulator = simulator
        own = {id(parameter): name for name, parameter in simulator.shared.items()}
        self.received: dict[nn.Module, Tensor] = {}
        self._weights: dict[nn.Module, float] = {}
        self._sent: dict[nn.Module, Tensor] = {}
        for module in simulator.network.modules():
            name = own.get(id(getattr(module, "weight", None)), "")
            if name in received and received[name].dim() == 2:
                self._weights[module] = deviations[name] ** -2
                self.received[module] = _inwards(module, received[name].float() * self._weights[module])
                kept = None if sent is None else sent[name]
                if kept is not None:
                    self._sent[module] = _inwards(module, kept)

    def scores(self, texts: Sequence[Ids]) -> Scores:
        """S of texts.

        Args:
            texts: Token ids, at least one text.
        """
        found = torch.stack(by_parts(self.simulator.network, texts, self._scores_of))  # texts x classes x 2
        best = found[:, :, 0].max(1)
        return Scores(best.values, best.indices, found[torch.arange(len(texts)), best.indices, 1])

    def _scores_of(self, texts: list[Ids]) -> Iterator[Tensor]:
        """S and weight of a few texts under every label."""
        with self._watched() as parts:
            logits, _ = self.simulator.logits(texts)
            if logits.shape[1] > 2:
                columns = [_filtered(_loss(logits, label), parts) for label in range(logits.shape[1])]
            else:  # the gradients of two classes have one direction
                first, chances = _filtered(_loss(logits, 0), parts), logits.detach().softmax(1)
                odds = torch.stack([torch.ones_like(chances[:, 0]), chances[:, 1] / chances[:, 0]], 1)
                columns = [first, -first * odds]
        return iter(torch.stack(columns, 1).cpu().double())

    def slopes(self, texts: Sequence[Ids], labels: Sequence[int]) -> list[Float[Tensor, "tokens width"]]:
        """The gradients of texts' losses in their embeddings.

        Args:
            texts: Token ids, at least one text.
            labels: Their classes.

        Returns:
            float64, one a text.
        """
        found: dict[int, Tensor] = {}
        for part in parts_of(self.simulator.network, texts):
            with self._watched() as parts:
                logits, _ = self.simulator.logits([texts[place] for place in part])
                own = next(each.output for each in parts if each.module is self.words)
                (slopes,) = torch.autograd.grad(_loss(logits, [labels[place] for place in part]), own)
            found |= {place: precise(one[: len(texts[place])]) for place, one in zip(part, slopes, strict=True)}
        return [found[place] for place in range(len(texts))]

    @property
    def words(self) -> nn.Module:
        """The embedding of tokens."""
        return self.simulator.network.get_input_embeddings()

    @contextmanager
    def _watched(self) -> Iterator[list[_Part]]:
        """Let graphs begin at the embeddings' outputs, and keep what enters and leaves all maps."""
        parts: list[_Part] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            if isinstance(module, nn.Embedding):
                output = output.detach().requires_grad_(True)
            received, weight = self.received.get(module, output[:0]), self._weights.get(module, 0.0)
            parts.append(_Part(module, inputs[0], output, received, weight, self._sent.get(module)))
            return output

        handles = [module.register_forward_hook(keep) for module in {*self.received, self.words}]
        try:
            with torch.enable_grad():
                yield parts
        finally:
            for handle in handles:
                handle.remove()


def _inwards(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or what belongs to its entries, as inputs x outputs."""
    return weight.T.contiguous() if isinstance(module, nn.Linear) else weight


def _loss(logits: Tensor, labels: int | Sequence[int]) -> Tensor:
    """A scalar with the gradient that a sum of cross entropies has in the logits of texts, of one label or of each."""
    slopes = logits.detach().softmax(-1)
    slopes[torch.arange(len(slopes)), labels] -= 1
    return (logits * slopes).sum()


def _filtered(loss: Tensor, parts: list[_Part]) -> Float[Tensor, "texts 2"]:
    """S and weight of the texts that a scalar sums over."""
    slopes = torch.autograd.grad(loss, [part.output for part in parts], retain_graph=True)
    shared = [(part, slope) for part, slope in zip(parts, slopes, strict=True) if part.received.numel()]
    products = torch.stack([part.product(slope) for part, slope in shared]).sum(0)
    squares = torch.stack([part.square(slope) for part, slope in shared]).sum(0).clamp(min=1e-30)
    return torch.stack([products / squares.sqrt(), products / squares], 1).detach()
