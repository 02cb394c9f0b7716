"""Which tokens texts that are known leave over for others, by the rows of the tokens' embedding.

Chapter `12_federated`.

A token's row sums the slopes at the places where it stands, whatever else the batch holds. The slopes of a known text
follow from the model halfway and from its end: there the last block's MLP output map has a gradient of one product for
each text, of what enters the map and of the slope behind it. What these leave of the row of a token that stands in
known texts alone is what drifted; the row of any other token stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.streaming import is_streamed
from dager_tutorial.models.tap import MLP_OUTPUT, precise
from dager_tutorial.models.training import filled_and_masked
from dager_tutorial.server.absolute import absolute_residual
from dager_tutorial.server.constants import constants
from dager_tutorial.server.embedding_rows import among, rows_of
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.passes import parts_of
from dager_tutorial.server.token_filter import Candidates

Ids = tuple[int, ...]


def left_over(evidence: Evidence, adapter: DecoderAdapter, texts: Sequence[Ids], candidates: Candidates) -> Candidates:
    """The candidates that a text beside the known ones may hold.

    Args:
        evidence: The update's gradients.
        adapter: The architecture.
        texts: Token ids of the known texts.
        candidates: Tokens that may stand at each position.

    Returns:
        Those whose rows the texts leave over, and those that several of the texts hold, since another one that holds
        such a token hardly shows in its row; all of them where the rows or the last block's MLP output map were not
        shared, where too much drifted for the rows to tell, or where the model is read from disk block by block.
    """
    rows = rows_of(evidence, adapter.first_input.tokens)
    ends = adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT).gradient(evidence.gradients)
    if rows is None or ends is None or not texts or is_streamed(adapter.network):  # no way back through blocks on disk
        return candidates
    tokens = candidates.distinct()
    held = Counter(token for text in texts for token in set(text))
    common = torch.tensor([held[token] >= constants().common for token in tokens.tolist()], device=tokens.device)
    left = _left(precise(rows[tokens]), _known(adapter, texts, precise(ends), tokens))
    others = common | (left > constants().left_over)
    return among(candidates, tokens[others]) if others.float().mean() < constants().most_left_over else candidates


def _left(rows: Float[Tensor, "tokens width"], known: Float[Tensor, "texts tokens width"]) -> Float[Tensor, " tokens"]:
    """What texts leave of each row, as a share of its length; how much each of them counts is fitted.

    Tokens of other texts stay whole whatever is fitted, so that absolute deviations count, not squares.
    """
    sizes = rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    target, basis = (rows / sizes).flatten(), (known / sizes).flatten(1).T
    return absolute_residual(target, basis).view_as(rows).norm(dim=1)


def _known(
    adapter: DecoderAdapter,
    texts: Sequence[Ids],
    ends: Float[Tensor, "outputs inputs"],
    tokens: Int[Tensor, " tokens"],
) -> Float[Tensor, "texts tokens width"]:
    """What each text adds to the rows of some tokens (float64), up to a factor."""
    known = precise(adapter.first_input.tokens.new_zeros(len(texts), len(tokens), adapter.hidden_size))
    for text, into, slopes in zip(texts, known, _slopes(adapter, texts, ends), strict=True):
        ids = torch.tensor(text, device=tokens.device)
        places = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        among_them = tokens[places] == ids
        into.index_add_(0, places[among_them], slopes[among_them])
    return known


def _slopes(
    adapter: DecoderAdapter, texts: Sequence[Ids], ends: Float[Tensor, "outputs inputs"]
) -> list[Float[Tensor, "tokens width"]]:
    """The gradients (float64) of texts' losses in their embeddings, from the slopes behind the last block."""
    behind = _slopes_behind(adapter, texts, ends)
    found: dict[int, Tensor] = {}
    for part in parts_of(adapter.network, texts):
        embedded, states = _ran(adapter, [texts[place] for place in part])
        last = torch.tensor([len(texts[place]) - 1 for place in part], device=states.device)
        read = states[torch.arange(len(part), device=states.device), last]
        (slopes,) = torch.autograd.grad((read * behind[part].to(read)).sum(), embedded)
        found |= {place: precise(each[: len(texts[place])]) for place, each in zip(part, slopes, strict=True)}
    return [found[place] for place in range(len(texts))]


def _slopes_behind(
    adapter: DecoderAdapter, texts: Sequence[Ids], ends: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "texts outputs"]:
    """The slopes at texts' ends behind the last block, of which the gradient of its MLP's output map is made up."""
    tap = adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT)
    read: dict[int, Tensor] = {}
    for part in parts_of(adapter.network, texts):
        ids, mask = filled_and_masked([texts[place] for place in part], 0, device=ends.device)
        inputs = adapter.tap_inputs(ids, mask, [tap])[tap]
        read |= {place: precise(one[len(texts[place]) - 1]) for place, one in zip(part, inputs, strict=True)}
    inputs = torch.stack([read[place] for place in range(len(texts))])
    sizes = inputs.norm(dim=1, keepdim=True)
    alike = (inputs / sizes) @ (inputs / sizes).T
    alike.diagonal().add_(constants().end_ridge)
    return torch.linalg.solve(alike, (inputs / sizes) @ ends.T) / sizes


def _ran(adapter: DecoderAdapter, texts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """The embeddings of texts, and the states behind the last block with the graph that leads to them from there."""
    seen: list[Tensor] = []

    def begin(_module: object, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_(True))
        return seen[0]

    def end(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    words, last = adapter.network.get_input_embeddings(), adapter.blocks[adapter.num_blocks - 1]
    handles = [words.register_forward_hook(begin), last.register_forward_hook(end)]
    ids, mask = filled_and_masked(texts, 0, device=words.weight.device)
    try:
        with torch.enable_grad():
            positions = adapter.position_ids(mask)
            adapter.network(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], seen[1]
