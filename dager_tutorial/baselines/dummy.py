"""The client's step made again on embeddings instead of tokens, so that its gradient can be differentiated in them.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, layer_norm, one_hot
from torch.overrides import TorchFunctionMode

from dager_tutorial.baselines.distances import Distance
from dager_tutorial.baselines.tokens import NearestTokens, framed
from dager_tutorial.baselines.told import Told
from dager_tutorial.errors import DagerError
from dager_tutorial.models.heads import Head, choose_pad
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.training import filled, filled_and_masked
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.simulation import Simulator
from dager_tutorial.update import Update

Vectors = Float[Tensor, "guesses texts length width"]
"""Embeddings of several guesses at a batch, pads included."""

Chances = Float[Tensor, "guesses texts classes"]
"""The labels of each guess, as probabilities of the classes."""


class DummyStep:
    """A classification step of the client whose texts are embeddings, many guesses at a time.

    The unmodified network runs; only what its embedding module returns is replaced. The gradient of that module is
    left out, since it depends on tokens and not on embeddings. All gradients are divided by the norm of the received
    ones: a distance then has the same scale for every model and head.

    Args:
        model: The model both sides know.
        update: What the client sent.
        told: What is known of the batch.
        head: The head that the server handed out; the default one where None.

    Raises:
        DagerError: The update is no gradient of a classification, or holds nothing but token embeddings.
    """

    def __init__(self, model: LanguageModel, update: Update, told: Told, head: Head | None = None) -> None:
        simulator = Simulator(model, update, head or Head(), model.network.dtype)
        if update.kind != "gradient" or simulator.head.task != "classification" or model.adapter:
            raise DagerError("earlier attacks match gradients of a classification of the whole model: give such a one")
        self.model, self.told, self.network = model, told, simulator.network
        self.embedding: nn.Embedding = self.network.get_input_embeddings()
        self.parameters, received = _matched(simulator, update)
        self.scale = torch.stack([each.norm() for each in received.values()]).norm()
        self.received = {name: each / self.scale for name, each in received.items()}
        self.nearest = NearestTokens(self.embedding.weight, model.tokenizer)
        self.frames = [framed(model.tokenizer, length) for length in told.lengths]
        self.inputs = self._inputs(simulator)
        self.fixed: Float[Tensor, "texts length width"] = self.embedding(self.inputs["input_ids"])
        self.free: Bool[Tensor, "texts length"] = self._free()

    def _inputs(self, simulator: Simulator) -> dict[str, Any]:
        """What the network is called with: tokens that are known, pads, and any others elsewhere."""
        texts = [[0 if token is None else token for token in frame] for frame in self.frames]
        pad = choose_pad(self.network, self.model.tokenizer, texts)
        ids, mask = filled_and_masked(texts, pad, device=self.model.device)
        positions = simulator.adapter.position_ids(mask)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}

    def _free(self) -> Tensor:
        """Where embeddings are unknown."""
        rows = [[int(token is None) for token in frame] for frame in self.frames]
        return filled(rows, 0, side="right", device=self.model.device).bool()

    @property
    def chances(self) -> Float[Tensor, "texts classes"]:
        """The labels that were told, as probabilities."""
        labels = torch.tensor(self.told.labels, device=self.model.device)
        return one_hot(labels, self.network.config.num_labels).to(self.fixed)

    def framed(self, vectors: Vectors) -> Vectors:
        """The same with the embeddings that are known in their places.

        Args:
            vectors: Guesses at all embeddings.
        """
        return torch.where(self.free[..., None], vectors, self.fixed)

    def distances(self, vectors: Vectors, chances: Chances, distance: Distance, budget: Budget) -> Float[Tensor, " _"]:
        """The distance of each guess's gradient from the one received, differentiable in embeddings and labels.

        Args:
            vectors: Embeddings.
            chances: Labels.
            distance: How to compare.
            budget: Of memory: one guess takes a gradient, and as much again for what leads there.
        """

        def one(vectors: Tensor, chances: Tensor) -> Tensor:
            found = grad(self._loss)(self.parameters, vectors, chances)
            return distance({name: each / self.scale for name, each in found.items()}, self.received)

        together = budget.chunk(8 * sum(each.numel() for each in self.parameters.values()))
        with sdpa_kernel(SDPBackend.MATH), _PlainNorm():  # fused kernels cannot be differentiated twice, or are wrong
            return vmap(one, chunk_size=together)(self.framed(vectors), chances)

    def _loss(self, parameters: dict[str, Tensor], vectors: Tensor, chances: Tensor) -> Tensor:
        """The client's loss of one guess."""
        with _returning(self.embedding, vectors):
            logits = functional_call(self.network, parameters, (), self.inputs).logits
        return cross_entropy(logits, chances)


def _matched(simulator: Simulator, update: Update) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters whose gradients are compared, by the network's names, and the gradients received.

    Gradients that are rounding alone, as a key's bias has, point nowhere and are left out.

    Raises:
        DagerError: There is none, or all are zero.
    """
    names = {id(parameter): name for name, parameter in simulator.network.named_parameters()}
    tokens = simulator.network.get_input_embeddings().weight
    shared = {name: each for name, each in simulator.shared.items() if each is not tokens}
    received = {names[id(each)]: update.gradients[name].to(each) for name, each in shared.items()}
    norms = {name: float(each.norm()) for name, each in received.items()}
    least = 4 * torch.finfo(simulator.network.dtype).eps * max(norms.values(), default=0.0)
    held = {id(each): each.detach() for each in shared.values() if norms[names[id(each)]] > least}
    if not held:
        raise DagerError("the update holds nothing that a simulated gradient could be compared with: share more of it")
    return {names[key]: each for key, each in held.items()}, {names[key]: received[names[key]] for key in held}


class _PlainNorm(TorchFunctionMode):
    """Layer norms out of plain operations: of the fused one, `vmap` differentiates twice as if it held its statistics.

    Its second derivatives lack what comes through mean and deviation (PyTorch 2.13); finite differences show it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put the plain norm in the place of the fused one."""
        return (_layer_norm if function is layer_norm else function)(*args, **(kwargs or {}))


def _layer_norm(
    vectors: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """What `torch.nn.functional.layer_norm` computes over a last dimension."""
    spread = vectors - vectors.mean(-1, keepdim=True)
    vectors = spread * (spread.square().mean(-1, keepdim=True) + eps).rsqrt()
    vectors = vectors if weight is None else vectors * weight
    return vectors if bias is None else vectors + bias


@contextmanager
def _returning(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Let a module return something else."""
    handle = module.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()
