"""Forward and backward passes of texts that the server simulates, a few texts at a time (chapter `09_completion`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from dager_tutorial.models.streaming import is_streamed, recomputed, tokens_at_once
from dager_tutorial.models.training import requiring_grad
from dager_tutorial.server.constants import constants

Ids = tuple[int, ...]
Result = TypeVar("Result")


def parts_of(network: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of texts that go through a network at once: of similar length, so that little is padded.

    Args:
        network: The network.
        texts: Token ids, all of them.
    """
    most = tokens_at_once(network, constants().tokens_trained_at_once)
    part: list[int] = []
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place])):
        if part and len(texts[place]) * (len(part) + 1) > most:
            yield part
            part = []
        part.append(place)
    yield part


def by_parts(
    network: PreTrainedModel, texts: Sequence[Ids], run: Callable[[list[Ids]], Iterable[Result]]
) -> list[Result]:
    """What something makes of texts that go through a network at once, in the order of the texts.

    Args:
        network: The network.
        texts: Token ids of all of them, at least one.
        run: Gives one result a text.
    """
    found: dict[int, Result] = {}
    for part in parts_of(network, texts):
        found |= zip(part, run([texts[place] for place in part]), strict=True)
    return [found[place] for place in range(len(texts))]


def take_off(
    rest: Mapping[str, Tensor],
    network: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    texts: Sequence[Sequence[int]],
    loss: Callable[[list[int]], Tensor],
) -> None:
    """Take the gradient of a loss off what is there, part by part and parameter by parameter.

    Args:
        rest: Tensors by the parameters' names, changed in place.
        network: The network that the loss runs.
        parameters: Its parameters, by the same names.
        texts: Token ids.
        loss: A scalar, of the places of some of the texts; it sums over them.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        here = rest[names[id(parameter)]]
        here.sub_(parameter.grad.to(here))
        parameter.grad = None  # no second copy of all gradients is ever held

    with requiring_grad(parameters), recomputed(network) if is_streamed(network) else nullcontext():
        handles = [each.register_post_accumulate_grad_hook(take) for each in parameters.values()]
        try:
            for part in parts_of(network, texts):
                loss(part).backward(inputs=list(parameters.values()))
        finally:
            for handle in handles:
                handle.remove()
