"""The client's step, made again by the server from texts that it knows.

A batch's gradient is a sum over its texts, and the server has everything that a term of it needs: the weights, the head
that it handed out, and the text.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.heads import Head, choose_pad, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import Tap, precise
from dager_tutorial.models.training import filled_and_masked, in_dtype
from dager_tutorial.server.missing.entries import sent_as
from dager_tutorial.server.passes import Ids, by_parts, take_off
from dager_tutorial.update import Update

Objective = Callable[[list[int], Tensor, Tensor], Tensor]
"""A scalar, of the places of some texts, their logits (texts x classes, or texts x length x vocabulary), their mask."""


@dataclass(frozen=True)
class Factors:
    """What each text adds to the gradient of a map of the last block: `sum_c v_c slope_c` times `inputs`.

    Attributes:
        inputs: float64, what enters the map at the token that the loss reads.
        slopes: float64, the gradient of each class's logit at the map's output.
        chances: float64, the probabilities of the classes.
    """

    inputs: Float[Tensor, "texts inner"]
    slopes: Float[Tensor, "texts classes width"]
    chances: Float[Tensor, "texts classes"]

    @property
    def contrasts(self) -> Float[Tensor, "texts others width"]:
        """The slopes of all logits but the first, less the first's: a logit gradient sums to zero over the classes."""
        return self.slopes[:, 1:] - self.slopes[:, :1]


class Simulator:
    """The client's network, and the parameters whose gradients were shared.

    Args:
        model: The model both sides know.
        update: What the client sent: it tells which parameters were shared, and how many classes the head has.
        head: The head that the server handed out.
        dtype: The client's precision: the same kernels repeat its rounding.

    Raises:
        DagerError: transformers has no head for the task, or given numbers do not fit.
    """

    def __init__(self, model: LanguageModel, update: Update, head: Head, dtype: torch.dtype) -> None:
        backbone = in_dtype(model.network, dtype)
        self.model, self.head = model, _fitting(head, update, backbone)
        self.network: PreTrainedModel = with_head(backbone, model.tokenizer, self.head)
        self.adapter: Adapter = adapter_for(backbone)
        self.shared = dict(_shared(self.network, update))
        self._update, self._dtype = update, dtype

    @cached_property
    def sent(self) -> tuple[int | None, bool]:
        """With how many bits the update was sent, and whether with some of its entries only (`entries.sent_as`)."""
        return sent_as(self.adapter, self._update.for_backbone(self.model.network), self._dtype)

    def _padded(self, texts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Token ids and mask of texts, padded on the right."""
        pad = choose_pad(self.network, self.model.tokenizer, texts)
        return filled_and_masked(texts, pad, device=self.model.device)

    def logits(self, texts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Logits of some texts by the unmodified forward pass, and their mask."""
        ids, mask = self._padded(texts)
        positions = self.adapter.position_ids(mask)
        return self.network(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits, mask

    @torch.no_grad()
    def chances(self, texts: Sequence[Ids]) -> Float[Tensor, "texts classes"]:
        """The probabilities (float64) that the model gives the classes of each text.

        Args:
            texts: Token ids, at least one text.
        """
        return torch.stack(by_parts(self.network, texts, lambda part: precise(self.logits(part)[0]).softmax(-1).cpu()))

    def factors(self, texts: Sequence[Ids], tap: Tap) -> Factors:
        """What texts add to the gradient of a map of the last block, under a loss that reads one token of each.

        Args:
            texts: Token ids, at least one text.
            tap: The map: the last block's MLP output, or its attention output.
        """
        found = by_parts(self.network, texts, lambda part: self._factors(part, tap))
        inputs, slopes, chances = zip(*found, strict=True)
        return Factors(torch.stack(inputs), torch.stack(slopes), torch.stack(chances))

    def _factors(self, texts: Sequence[Ids], tap: Tap) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each text what enters the map, the slopes, and the probabilities."""
        with self.cut_behind(tap) as seen:
            logits, _ = self.logits(texts)
            each = (torch.autograd.grad(one.sum(), seen["output"], retain_graph=True)[0] for one in logits.T)
            slopes = torch.stack(list(each), 1)  # texts x classes x length x width
        rows = torch.arange(len(texts))
        read = slopes.square().sum((1, 3)).argmax(1)  # the one token of each text that the loss reads
        chances = precise(logits.detach()).softmax(-1)
        vectors = precise(seen["inputs"].detach()[rows, read]), precise(slopes[rows, :, read]), chances
        return list(zip(*(each.cpu() for each in vectors), strict=True))

    @contextmanager
    def cut_behind(self, tap: Tap) -> Iterator[dict[str, Tensor]]:
        """Let the graphs of forward passes begin at the output of a linear map: what lies before it is not kept.

        Args:
            tap: The map.

        Yields:
            After a pass, what entered the map as `inputs` and what left it as `output`, a leaf of the graph.
        """
        seen: dict[str, Tensor] = {}

        def cut(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """Put a leaf in the output's place."""
            seen["inputs"], seen["output"] = args[0], output.detach().requires_grad_(True)
            return seen["output"]

        (linear,) = self.adapter.linear_maps(tap.block, tap.kind)
        handle = linear.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                yield seen
        finally:
            handle.remove()

    def subtract(self, rest: Mapping[str, Tensor], texts: Sequence[Ids], objective: Objective) -> None:
        """Take the gradient of an objective off what is there, part by part and parameter by parameter.

        Args:
            rest: Tensors by the update's names, changed in place.
            texts: Token ids.
            objective: Sums over the texts.
        """

        def loss(part: list[int]) -> Tensor:
            logits, mask = self.logits([texts[place] for place in part])
            return objective(part, logits, mask)

        take_off(rest, self.network, self.shared, texts, loss)


def of_logits(gradients: Float[Tensor, "texts classes"]) -> Objective:
    """The objective whose gradient in the logits of a classification is given.

    Args:
        gradients: What the client's loss has there, float64.
    """
    return lambda part, logits, mask: (logits * gradients[part].to(logits)).sum()


def _fitting(head: Head, update: Update, backbone: PreTrainedModel) -> Head:
    """The head with as many classes as the update's own head gradient has rows, where it was shared."""
    if head.task != "classification":
        return head
    rows = [len(tensor) for tensor in update.for_head(backbone).values() if tensor.dim() == 2]
    return replace(head, classes=min(rows)) if rows and not head.weights else head


def _shared(network: PreTrainedModel, update: Update) -> Iterator[tuple[str, nn.Parameter]]:
    """The network's parameters of which the update holds a gradient of the same shape, by the update's names."""
    parameters = dict(network.named_parameters())
    for name, tensor in update.gradients.items():
        for own in (name, f"{network.base_model_prefix}.{name}"):
            if own in parameters and parameters[own].shape == tensor.shape:
                yield name, parameters[own]
                break
