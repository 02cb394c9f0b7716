"""A batch that the server makes up, to learn from it what evidence is worth (chapter `11_limits`).

The server knows the model, so it can compute the gradient of any batch. One of random texts, as many and about as long
as the private ones, shows how the leverages of its true rows differ from those of false rows at every tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import Tap
from dager_tutorial.models.training import filled_and_masked
from dager_tutorial.server.passes import take_off
from dager_tutorial.server.token_filter import Candidates

Text = tuple[int, ...]


@dataclass(frozen=True)
class Inputs:
    """What enters the taps at some prefixes.

    Attributes:
        vectors: For each tap, prefixes x inputs, in the network's dtype.
        positions: int64, the position of each prefix's last token.
    """

    vectors: Mapping[Tap, Tensor]
    positions: Int[Tensor, " prefixes"]


@dataclass(frozen=True)
class Examples:
    """Rows of a simulated batch, and rows that are not in it.

    Attributes:
        true: Prefixes of its texts.
        wrong: Prefixes of its texts with another last token.
        copies: Prefixes of its texts with one earlier token exchanged.
    """

    true: Inputs
    wrong: Inputs
    copies: Inputs


def simulated_texts(candidates: Candidates, count: int, rows: int, generator: torch.Generator) -> list[Text]:
    """Texts of random candidates.

    Args:
        candidates: Tokens that may stand at each position.
        count: How many texts.
        rows: About how many tokens they have together.
        generator: Source of randomness, on the CPU.
    """
    mean = max(3, round(rows / count))
    longest = mean + mean // 2
    if not candidates.every_position:
        longest = max(2, min(longest, len(candidates.tokens)))
    shortest = max(2, min(2 * mean - longest, longest))
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [tuple(_drawn(candidates, place, generator) for place in range(length)) for length in lengths.tolist()]


def _drawn(candidates: Candidates, position: int, generator: torch.Generator) -> int:
    """A token that may stand at a position; where none may, any."""
    here = candidates.at(position)
    tokens = here if len(here) else candidates.distinct()
    return int(tokens[int(torch.randint(len(tokens), (1,), generator=generator))])


def simulated_gradients(
    adapter: DecoderAdapter, texts: Sequence[Text], taps: Sequence[Tap], generator: torch.Generator, *, ends: bool
) -> dict[str, Tensor]:
    """Gradients of the taps' parameters, of a loss whose gradient in the last hidden states is random.

    Args:
        adapter: The architecture.
        texts: The batch.
        taps: Whose parameters.
        generator: Source of randomness, on the CPU.
        ends: Whether the loss reads each text's last token only, by two classes, instead of every token.
    """
    network, names = adapter.network, {name for tap in taps for name in tap.parameters}
    parameters = {name: each for name, each in network.named_parameters() if name in names}
    total = {name: torch.zeros_like(each) for name, each in parameters.items()}
    contrast = torch.randn(adapter.hidden_size, generator=generator)

    def loss(part: list[int]) -> Tensor:
        hidden, mask = _hidden(adapter, [texts[place] for place in part])
        direction = torch.randn(hidden.shape, generator=generator)
        if ends:
            signs = torch.randint(2, (len(part), 1), generator=generator) * 2.0 - 1.0
            direction.zero_()[torch.arange(len(part)), mask.sum(1).cpu() - 1] = signs * contrast
        return (hidden * direction.to(hidden) * mask[..., None]).sum()

    take_off(total, network, parameters, texts, loss)
    return total


def _hidden(adapter: DecoderAdapter, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """The last hidden states of texts, and their mask."""
    ids, mask = filled_and_masked(texts, 0, device=adapter.first_input.tokens.device)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": adapter.position_ids(mask)}
    return adapter.network(**inputs, use_cache=False).last_hidden_state, mask


def examples(
    adapter: DecoderAdapter,
    texts: Sequence[Text],
    candidates: Candidates,
    taps: Sequence[Tap],
    generator: torch.Generator,
) -> Examples:
    """What enters the taps at true and at false prefixes of some texts.

    Args:
        adapter: The architecture.
        texts: Texts of the simulated batch.
        candidates: Tokens that may stand at each position.
        taps: Which inputs to read.
        generator: Source of randomness, on the CPU.
    """
    parts = [_of_text(adapter, text, candidates, taps, generator) for text in texts]
    kinds = [[part[kind] for part in parts] for kind in range(3)]
    return Examples(*map(_joined, kinds))


def _joined(parts: Sequence[Inputs]) -> Inputs:
    vectors = {tap: torch.cat([part.vectors[tap] for part in parts]) for tap in parts[0].vectors}
    return Inputs(vectors, torch.cat([part.positions for part in parts]))


def _of_text(
    adapter: DecoderAdapter, text: Text, candidates: Candidates, taps: Sequence[Tap], generator: torch.Generator
) -> tuple[Inputs, Inputs, Inputs]:
    """A text's prefixes, those with another last token, and a copy with one token exchanged, in one forward pass."""
    length = len(text)
    place = int(torch.randint(length - 1, (1,), generator=generator))
    wrong = [_drawn(candidates, position, generator) for position in range(length)]
    ids = torch.tensor([*text, *wrong, *text[place + 1 :]])
    positions = torch.tensor([*range(length), *range(length), *range(place + 1, length)])
    sees = torch.eye(len(ids), dtype=torch.bool)
    own = torch.ones(length, length, dtype=torch.bool).tril()
    sees[:length, :length] = own
    sees[length : 2 * length, :length] = own.tril(-1)
    sees[2 * length :, :place] = True
    sees[2 * length :, length + place] = True
    sees[2 * length :, 2 * length :] = torch.ones(length - 1 - place, length - 1 - place, dtype=torch.bool).tril()
    device = adapter.first_input.tokens.device
    vectors = adapter.tree_inputs(ids.to(device), positions.to(device), sees.to(device), taps)
    bounds = [0, *accumulate([length, length, length - 1 - place])]
    return tuple(  # type: ignore[return-value]
        Inputs({tap: each[begin:end] for tap, each in vectors.items()}, positions[begin:end])
        for begin, end in pairwise(bounds)
    )
