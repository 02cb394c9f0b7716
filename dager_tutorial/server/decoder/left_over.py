"""Which tokens texts that are known leave over for others, by the rows of the tokens' embedding.

Chapter `12_federated`.

A token's row sums the slopes at the places where it stands, whatever else the batch holds. The slopes of a known text
follow from the model halfway and from its end: there the last block's MLP output map has a gradient of one product for
each text, of what enters the map and of the slope behind it. What these leave of the row of a token that stands in
known texts alone is what drifted, much the same for most of them; the row of any other token stays.
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
from dager_tutorial.server.embedding_rows import among, table_gradient
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.passes import Ids, by_parts
from dager_tutorial.server.token_filter import Candidates


def left_over(
    evidence: Evidence,
    adapter: DecoderAdapter,
    texts: Sequence[Ids],
    candidates: Candidates,
    doubtful: Sequence[Ids] = (),
) -> Candidates:
    """The candidates that a text beside the known ones may hold.

    Args:
        evidence: The update's gradients.
        adapter: The architecture.
        texts: Token ids of the known texts.
        candidates: Tokens that may stand at each position.
        doubtful: Token ids of texts that may be there, rightly or nearly so.

    Returns:
        Those whose rows the texts leave over, those of the doubtful texts, and those that several of the known texts
        hold, since another one that holds such a token hardly shows in its row; all of them where the rows or the last
        block's MLP output map were not shared, where too much drifted for the rows to tell, where few texts are known,
        or where the model is read from disk block by block.
    """
    if not texts or is_streamed(adapter.network):  # no way back through blocks on disk
        return candidates
    rows = table_gradient(evidence, adapter.first_input.tokens)
    ends = adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT).gradient(evidence.gradients)
    if rows is None or ends is None:
        return candidates
    tokens = candidates.distinct()
    held = Counter(token for text in texts for token in set(text))
    counts = torch.tensor([held[token] for token in tokens.tolist()], device=tokens.device)
    common = counts >= constants().common
    left, once = _left(precise(rows[tokens]), _known(adapter, texts, precise(ends), tokens)), (counts > 0) & ~common
    drifted = float(left[once].median()) if bool(once.any()) else 0.0
    others = common | (left > max(constants().left_over, constants().beyond_drift * drifted))
    if drifted > constants().most_drifted or float(others.float().mean()) > constants().most_left_over:
        return candidates
    maybe = tokens.new_tensor(sorted({token for text in doubtful for token in text}))
    return among(candidates, torch.cat([tokens[others], maybe]))


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
    stands = (tokens[:, None] == torch.tensor(text, device=tokens.device) for text in texts)
    slopes = _slopes(adapter, texts, ends)
    return torch.stack([here.to(own) @ own for here, own in zip(stands, slopes, strict=True)])


def _slopes(
    adapter: DecoderAdapter, texts: Sequence[Ids], ends: Float[Tensor, "outputs inputs"]
) -> list[Float[Tensor, "tokens width"]]:
    """The gradients (float64) of texts' losses in their embeddings, from the slopes behind the last block."""
    behind = dict(zip(texts, _slopes_behind(adapter, texts, ends), strict=True))

    @torch.enable_grad()
    def slopes(part: list[Ids]) -> list[Tensor]:
        """Back from the ends of some texts."""
        embedded, states = _ran(adapter, part)
        read = [each[len(text) - 1] @ behind[text].to(each) for text, each in zip(part, states, strict=True)]
        (found,) = torch.autograd.grad(torch.stack(read).sum(), embedded)
        return [precise(each[: len(text)]) for text, each in zip(part, found, strict=True)]

    return by_parts(adapter.network, texts, slopes)


def _slopes_behind(
    adapter: DecoderAdapter, texts: Sequence[Ids], ends: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "texts outputs"]:
    """The slopes at texts' ends behind the last block, of which the gradient of its MLP's output map is made up.

    A pass of its own: each slope depends on what enters the map in all texts, and their graphs are too much to keep.
    """
    tap = adapter.tap(adapter.num_blocks - 1, MLP_OUTPUT)

    def entering(part: list[Ids]) -> list[Tensor]:
        """What enters the map at the ends of some texts."""
        found = adapter.tap_inputs(*filled_and_masked(part, 0, device=ends.device), [tap])[tap]
        return [precise(each[len(text) - 1]) for text, each in zip(part, found, strict=True)]

    inputs = torch.stack(by_parts(adapter.network, texts, entering))
    sizes = inputs.norm(dim=1, keepdim=True)
    units = inputs / sizes
    alike = units @ units.T
    alike.diagonal().add_(constants().end_ridge)
    return torch.linalg.solve(alike, units @ ends.T) / sizes


def _ran(adapter: DecoderAdapter, texts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """The embeddings of texts, and the states behind the last block with the graph that leads to them from there."""
    seen: list[Tensor] = []
    words, last = adapter.network.get_input_embeddings(), adapter.blocks[adapter.num_blocks - 1]
    ids, mask = filled_and_masked(texts, 0, device=words.weight.device)
    embedded = words(ids).detach().requires_grad_(True)
    handle = last.register_forward_hook(
        lambda _, inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        places = adapter.position_ids(mask)
        adapter.network(inputs_embeds=embedded, attention_mask=mask, position_ids=places, use_cache=False)
    finally:
        handle.remove()
    return embedded, seen[0]
