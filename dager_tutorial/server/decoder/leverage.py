"""When the rank is full: extensions that stand out by their leverage instead of their residual (chapter `11_limits`).

With as many distinct prefixes as the model is wide no vector lies outside the span any more. The spectrum still decays
over orders of magnitude, and a true row leans less on the weak directions than a false one: its leverage stands out
from that of all the other extensions tried at the same position. What stands out is measured in robust standard
deviations of the logarithm; nothing is fixed beforehand but how often chance alone may do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import MLP, QKV, Tap
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, FirstBlock, Front
from dager_tutorial.server.decoder.selector import Chosen
from dager_tutorial.server.odds import chance_quantile, usual
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates


class LeverageSelector:
    """Keeps the extensions whose leverage at the MLP and in block 1 stands out from all others.

    Args:
        adapter: The architecture.
        spans: Spans of block 0's MLP and of block 1's query, key and value, those that there are.
        candidates: Tokens that may stand at each position.
        budget: What it may cost.
        widest: How many prefixes of one length are kept at most.
    """

    certain = False
    longest_repeat = 0  # a repeated first token cannot be told from one, and there is no count of rows to tell

    def __init__(
        self,
        adapter: DecoderAdapter,
        spans: Mapping[Tap, Span],
        candidates: Candidates,
        budget: Budget,
        *,
        widest: int,
    ) -> None:
        self.mlp = spans.get(adapter.tap(0, MLP))
        self.next_block = spans.get(adapter.tap(1, QKV)) if adapter.num_blocks > 1 else None
        self.generator, self.batch_tokens = budget.generator(), candidates.distinct()
        self.block, self.widest = FirstBlock.screened(adapter, None, budget), widest

    def select(self, front: Front, extension: Extension) -> Chosen:
        """Choose the extensions that stand out; their ratio is the share of the deviation that chance explains."""
        pairs = self.block.everyone(front, extension)
        tried, first = self._of_everyone(front, extension, pairs)
        usual_first, usual_second = self._usual(front, extension)
        if not len(tried) or not len(usual_first):
            return Chosen(tried[:0], first[:0])
        count = len(first) if self.mlp is None else constants().carried * (len(front.nodes) + 8)
        carried = first.argsort()[:count]
        second = self._at_next_block(front, extension, tried[carried])
        at_mlp, at_next = usual(usual_first), usual(usual_second)
        total = at_mlp.deviations(first[carried]) + at_next.deviations(second)
        chance = at_mlp.deviations(usual_first) + at_next.deviations(usual_second)
        deviation = usual(chance).deviations(total)
        needed = chance_quantile(constants().false_alarms / len(pairs))
        if self.block.budget.late:  # the last ones were not computed
            return Chosen(tried[:0], first[:0])
        chosen = deviation <= -needed
        return Chosen(tried[carried[chosen]], -needed / deviation[chosen])

    def _usual(self, front: Front, extension: Extension) -> tuple[Tensor, Tensor]:
        """Log-leverages of pairs that are hardly ever true: the batch's tokens, of any position, after any prefix."""
        sample = constants().usual_sample
        draws = torch.randint(len(self.batch_tokens), (sample,), generator=self.generator)
        tokens = self.batch_tokens[draws.to(extension.tokens.device)]
        places = torch.randint(max(1, len(front.nodes)), (sample,), generator=self.generator).sort().values
        if not front.nodes:
            places = torch.full_like(places, -1)
        pairs = torch.stack([places, torch.arange(sample)], 1).to(tokens.device)
        others = self.block.extension(extension.position, tokens)
        first = self._at_mlp(others, pairs, self.block.of_pairs(front, others, pairs))[1]
        return first, self._at_next_block(front, others, pairs)[: len(first)]

    def _of_everyone(self, front: Front, extension: Extension, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs that were tried before the deadline, and their log-leverages at the MLP's input."""
        if not front.nodes:
            return self._at_mlp(extension, pairs, self.block.of_pairs(front, extension, pairs))
        return self._at_mlp(extension, pairs, self._in_chunks(front, extension))

    def _in_chunks(self, front: Front, extension: Extension) -> Iterator[tuple[Tensor, Tensor]]:
        """Like `FirstBlock.of_pairs` for all pairs, without a copy of the cache for each of them."""
        count = len(extension.tokens)
        choice = torch.arange(count, device=extension.tokens.device)
        for places in self.block.chunks(front, extension):
            yield (
                (places[:, None] * count + choice).flatten(),
                self.block.of_all(front, extension, places).flatten(0, 1),
            )

    def _at_mlp(
        self, extension: Extension, pairs: Int[Tensor, "pairs 2"], chunks: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Int[Tensor, "tried 2"], Float[Tensor, " tried"]]:
        """The pairs of some chunks, and their log-leverages at the MLP's input (zeros where it was not shared)."""
        adapter = self.block.adapter
        tried, leverages = [pairs[:0]], [extension.hidden.new_empty(0)]
        for part, attended in chunks:
            hidden = adapter.after_attention(0, extension.hidden[pairs[part, 1]], attended)
            inner = adapter.mlp_input(0, hidden)
            tried.append(pairs[part])
            leverages.append(inner.new_zeros(len(part)) if self.mlp is None else self.mlp.log_leverage(inner))
        return torch.cat(tried), torch.cat(leverages)

    def _at_next_block(
        self, front: Front, extension: Extension, pairs: Int[Tensor, "pairs 2"]
    ) -> Float[Tensor, " pairs"]:
        """Log-leverages at block 1's query, key and value (zeros where it was not shared)."""
        adapter = self.block.adapter
        leverages = extension.hidden.new_zeros(len(pairs))
        if self.next_block is None:
            return leverages
        for part, attended in self.block.of_pairs(front, extension, pairs):
            hidden = adapter.after_attention(0, extension.hidden[pairs[part, 1]], attended)
            hidden = adapter.after_mlp(0, hidden, adapter.mlp_input(0, hidden))
            leverages[part] = self.next_block.log_leverage(adapter.attention_input(1, hidden))
        return leverages
