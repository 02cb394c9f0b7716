"""A head that the server was not told, found from the update and the texts.

Where the gradient of the map to the classes was shared it is `sum_b v_b h_b^T`: the features h_b are known, so that
the gradients v_b in the logits follow by least squares, for any number of classes. Where it was not, two classes can
still be found: of the difference r of their rows it is known that `r S_b`, moved to the last block's MLP output by the
slopes S_b of the features, is what text b alone adds there. Its length follows from counts, which are whole.

More than two classes without the map's gradient are not found: for C classes the rows are known up to an invertible
mixture of C - 1, and which mixture makes all counts whole is a search that is not made here.

Chapter `09_completion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dager_tutorial.models.heads import Head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import MLP_OUTPUT, precise
from dager_tutorial.server.completion.classifier import ClassMap, Views, class_map_of, views_of
from dager_tutorial.server.completion.counting import Counts
from dager_tutorial.server.completion.remainder import explains, remainder_of
from dager_tutorial.server.completion.seen import Seen, map_from, seen_through
from dager_tutorial.server.completion.settling import settle_offset, settle_scale
from dager_tutorial.server.completion.simulation import Ids, Simulator, of_logits
from dager_tutorial.server.constants import constants
from dager_tutorial.update import Update


@dataclass(frozen=True)
class FoundHead:
    """What was found of a head.

    Attributes:
        head: The head; None where it was not found.
        numbered: Whether the numbers of the classes are certain; else two classes may be swapped.
        counts: Labels and copies of the texts under this head, in the order of the distinct texts.
        unexplained: What the texts leave unexplained of the update with this head, as a share of its norm.
        reason: One sentence: how it was found, or why not.
    """

    head: Head | None
    numbered: bool
    counts: Counts | None
    unexplained: float
    reason: str


class _Unknown(Exception):
    """The head cannot be found; the message is a sentence for people."""


@dataclass(frozen=True)
class _Case:
    """All that is known before the head is."""

    model: LanguageModel
    update: Update
    texts: tuple[Ids, ...]
    simulator: Simulator
    mapped: ClassMap
    views: Views
    seen: Seen
    gradient: Tensor  # of the last block's MLP output map, outputs x inputs
    error: float  # relative, of what is measured


def find_head(model: LanguageModel, update: Update, texts: Sequence[Ids], dtype: torch.dtype) -> FoundHead:
    """Find the head of a classification from the update and all texts of the batch.

    Args:
        model: The model both sides know.
        update: What the client sent.
        texts: Token ids of the texts of the batch; a text that occurs twice may be given once.
        dtype: The client's precision.

    Returns:
        The head, whether its classes are numbered for certain, and how far it explains the update.
    """
    try:
        case = _case(model, update, tuple(dict.fromkeys(texts)), dtype)
        numbered = case.mapped.weight in update.gradients
        head, counts = _numbered(case) if numbered else _of_two(case)
        return _checked(case, head, counts, numbered)
    except _Unknown as reason:
        return FoundHead(None, False, None, 1.0, str(reason))


def _case(model: LanguageModel, update: Update, texts: tuple[Ids, ...], dtype: torch.dtype) -> _Case:
    """See the texts from the map to the classes."""
    simulator = Simulator(model, update, Head(), dtype)
    mapped = class_map_of(simulator)
    if mapped is None:
        raise _Unknown("the head has a layer of unknown numbers before its map to the classes")
    adapter = simulator.adapter
    gradient = adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT).gradient(update.for_backbone(adapter.network))
    if gradient is None:
        raise _Unknown("the gradient of the last block's MLP output map was not shared")
    if not texts or len(texts) > min(gradient.shape):
        raise _Unknown(f"{len(texts)} texts are too few or too many for the last block's MLP output map")
    views = views_of(simulator, texts, mapped.module)
    error = torch.finfo(dtype).eps ** 0.5
    return _Case(model, update, texts, simulator, mapped, views, seen_through(views.slopes), gradient, error)


def _checked(case: _Case, head: Head, counts: Counts, numbered: bool) -> FoundHead:
    """The head, if with it the texts explain the update."""
    simulator = Simulator(case.model, case.update, head, case.simulator.network.dtype)
    left = remainder_of(simulator, case.update.gradients, case.texts, of_logits(counts.gradients)).share
    if not explains(left, simulator.network.dtype):
        return FoundHead(
            None, numbered, None, left, f"the head that fits best leaves {left:.1g} of the update unexplained"
        )
    how = "from its own gradient" if numbered else "from the last block's gradient, up to a swap of the classes"
    return FoundHead(head, numbered, counts, left, f"the head was found {how}")


def _head(case: _Case, weight: Tensor, offset: Tensor, way: Tensor | None) -> Head:
    """A head of these numbers; the offset goes where the head can have one."""
    weights = {case.mapped.weight: weight}
    if case.mapped.bias is not None:
        weights[case.mapped.bias] = offset
    elif way is not None:
        weights[case.mapped.weight] = weight + offset[:, None] * way
    return Head(classes=len(weight), weights=weights)


def _way_of_offset(case: _Case) -> Tensor | None:
    """A hidden direction that adds the same to the logits of all texts, as the bias of a last norm makes one."""
    hidden = case.views.features @ case.seen.hidden
    if not hidden.numel() or hidden.norm() <= case.error * case.views.features.norm():
        return None
    mixture = torch.linalg.pinv(hidden, rtol=case.error) @ hidden.new_ones(len(hidden))
    return case.seen.hidden @ mixture if (hidden @ mixture - 1).abs().max() <= case.error else None


# ---- with the gradient of the map to the classes


def _numbered(case: _Case) -> tuple[Head, Counts]:
    """The head and the counts, from the gradient of the map to the classes."""
    gradients = _of_logits(case)
    outputs = _solved(case.views.inputs, case.gradient, case.error)
    weight = map_from(case.seen, gradients, outputs)
    hidden = _hidden_part(case, weight, gradients)
    way = None if hidden is not None else _way_of_offset(case)
    weight = weight if hidden is None else weight + hidden
    free = case.mapped.bias is not None or way is not None
    settled = settle_offset(gradients, case.views.features @ weight.T, free=free)
    if settled is None:
        raise _Unknown("no head makes all counts of the texts whole")
    return _head(case, weight, settled.offset, way), settled.counts


def _of_logits(case: _Case) -> Tensor:
    """The loss's gradients in the logits of all texts (texts x classes)."""
    features, own = case.views.features, precise(case.update.gradients[case.mapped.weight]).cpu()
    bias = case.update.gradients.get(case.mapped.bias or "")
    if bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        own = torch.cat([own, precise(bias).cpu()[:, None]], 1)
    return _solved(features, own, case.error)


def _solved(known: Tensor, total: Tensor, error: float) -> Tensor:
    """The other factors (texts x outputs) of a sum of products with known vectors (texts x inputs), if it is all."""
    found = torch.linalg.lstsq(known.T, total.T).solution
    if (total - found.T @ known).norm() > error * total.norm():
        raise _Unknown("the texts do not add up to the gradient: some are missing")
    return found


def _hidden_part(case: _Case, weight: Tensor, gradients: Tensor) -> Tensor | None:
    """What the map has in directions that no text moves: the gradients of the last norm's own numbers show it.

    Returns:
        None where there is no such direction, or no such gradient was shared.
    """
    blocks = {id(each) for each in case.simulator.adapter.blocks.parameters()}
    late = {name: each for name, each in case.simulator.shared.items() if each.dim() == 1 and id(each) not in blocks}
    late.pop(case.mapped.bias or "", None)
    if not case.seen.hidden.shape[1] or not late:
        return None
    received = torch.cat([precise(case.update.gradients[name]).flatten() for name in late])
    rest = received - _pushed(case, late, weight, gradients)
    classes = (torch.eye(len(weight), dtype=weight.dtype) - 1 / len(weight))[1:]  # a shift of all shows nowhere
    parts = [one[:, None] * direction for one in classes for direction in case.seen.hidden.T]
    columns = torch.stack([_pushed(case, late, part, gradients) for part in parts], 1)
    mixture = torch.linalg.pinv(columns, rtol=case.error) @ rest
    return torch.einsum("p,pcf->cf", mixture, torch.stack(parts))


def _pushed(case: _Case, late: dict[str, torch.nn.Parameter], weight: Tensor, gradients: Tensor) -> Tensor:
    """The gradient in some parameters that a map to the classes passes on."""
    head = Head(classes=len(weight), weights={case.mapped.weight: weight})
    simulator = Simulator(case.model, case.update, head, case.simulator.network.dtype)
    simulator.shared = {name: simulator.shared[name] for name in late}
    passed = {name: torch.zeros(each.shape, dtype=torch.float64) for name, each in late.items()}
    simulator.subtract(passed, case.texts, of_logits(gradients))
    return -torch.cat([each.flatten() for each in passed.values()])


# ---- two classes, without it


def _of_two(case: _Case) -> tuple[Head, Counts]:
    """The head and the counts, from the last block's MLP output map."""
    outputs = _solved(case.views.inputs, case.gradient, case.error)
    row, shares = _polished(case, _row(case, outputs), outputs)
    way = _way_of_offset(case)
    free = case.mapped.bias is not None or way is not None
    settled = settle_scale(shares, case.views.features @ row, free=free)
    if settled is None:
        raise _Unknown("no length of the head makes all counts of the texts whole")
    weight = map_from(case.seen, settled.counts.gradients, outputs)
    hidden = _hidden_part(case, weight, settled.counts.gradients)
    if hidden is not None:
        weight, way = weight + hidden, None
    return _head(case, weight, settled.offset, way), settled.counts


def _row(case: _Case, outputs: Tensor) -> Tensor:
    """The direction of the difference of the two rows: the slopes take it to what each text puts out, up to length."""
    size = len(case.seen.whitened.T)
    total, wrong = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for slope, output in zip(case.seen.slopes, outputs / outputs.norm(), strict=True):
        square, along = output.square().sum() * slope @ slope.T, slope @ output
        total += square
        wrong += square - along[:, None] * along
    values, vectors = torch.linalg.eigh(total)
    kept = values > constants().unseen * values[-1]
    evened = vectors[:, kept] / values[kept].sqrt()
    found, mixtures = torch.linalg.eigh(evened.T @ wrong @ evened)
    amplitudes = found[:2].clamp(min=0).sqrt()
    if amplitudes[0] > case.error or amplitudes[1:].sum() < constants().clear_gap * amplitudes[0]:
        raise _Unknown("the gradient is not that of two classes")
    row = case.seen.whitened @ evened @ mixtures[:, 0]
    return row / row.norm()


def _polished(case: _Case, row: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The direction that fits all outputs best, given each text's share of it, and the shares (second logit)."""
    slopes = torch.einsum("f,tfw->tw", row, precise(case.views.slopes))
    shares = (outputs * slopes).sum(1) / slopes.square().sum(1)
    row = map_from(case.seen, torch.stack([-shares, shares], 1) / 2, outputs)[1]
    return row / row.norm(), shares * row.norm()
