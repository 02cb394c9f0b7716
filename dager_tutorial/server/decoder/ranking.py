"""Where no gap stands below the signal: how much better extensions fit than false ones do.

Chapter `12_federated`.

Without a gap the span tests pass true rows and many false ones with them, or fail weak true rows. What still tells is
the order: a row's residual at a tap against those of random extensions of the same prefixes, in robust deviations,
summed over the taps of block 0 and the next. The input of the MLP's output map counts most: it has several times as
many entries as the model is wide, so that there is room outside however many rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.front import Extension, FirstBlock, Front
from dager_tutorial.server.odds import usual
from dager_tutorial.server.subspace import Span


@dataclass(frozen=True)
class Ranking:
    """Weighs extensions at the taps of block 0 and the next.

    Attributes:
        spans: Spans of block 0's attention output, MLP and MLP output and of block 1's query, key and value, those that
            there are.
        block: Block 0.
        batch_tokens: int64, tokens that are usual in the batch.
        generator: Source of randomness, on the CPU.
    """

    spans: Mapping[Tap, Span]
    block: FirstBlock
    batch_tokens: Int[Tensor, " tokens"]
    generator: torch.Generator

    def promising(self, front: Front, extension: Extension) -> Int[Tensor, "pairs 2"]:
        """The extensions of each prefix that fit best in the attention output; all, where texts begin."""
        attention = self.spans.get(self.block.adapter.tap(0, ATTENTION_OUTPUT))
        count, most = len(extension.tokens), min(constants().ranked, len(extension.tokens))
        if not front.nodes or attention is None or count <= most:
            return self.block.everyone(front, extension)
        found = [self.block.everyone(front, extension)[:0]]
        for places in self.block.chunks(front, extension):
            attended = self.block.of_all(front, extension, places)
            misfit = _misfit(attention, attended.flatten(0, 1)).view(len(places), count)
            best = misfit.topk(most, 1, largest=False).indices
            found.append(torch.stack([places[:, None].expand_as(best), best], 2).flatten(0, 1))
        return torch.cat(found)

    def deviations(
        self, front: Front, extension: Extension, pairs: Int[Tensor, "pairs 2"]
    ) -> tuple[Float[Tensor, "taps pairs"], Float[Tensor, "taps false"]]:
        """How much better pairs fit than false ones do, tap by tap (negative where better), and the same of false ones.

        Both are float32; pairs that were not computed before the time was spent are infinite.
        """
        fits = self._misfits(front, extension, pairs)
        false = self._misfits(front, *self._false(front, extension))
        usually = [usual(row[row.isfinite()]) if bool(row.isfinite().any()) else usual(row) for row in false]
        return tuple(  # type: ignore[return-value]
            torch.stack([each.deviations(row) for each, row in zip(usually, rows, strict=True)])
            for rows in (fits, false)
        )

    def _false(self, front: Front, extension: Extension) -> tuple[Extension, Int[Tensor, "pairs 2"]]:
        """Pairs that are hardly ever true: the batch's tokens after any prefix."""
        sample = constants().ranked_sample
        draws = torch.randint(len(self.batch_tokens), (sample,), generator=self.generator)
        tokens = self.batch_tokens[draws.to(extension.tokens.device)]
        places = torch.randint(max(1, len(front.nodes)), (sample,), generator=self.generator).sort().values
        places = places if front.nodes else torch.full_like(places, -1)
        others = self.block.extension(extension.position, tokens)
        return others, torch.stack([places, torch.arange(sample)], 1).to(tokens.device)

    def _misfits(
        self, front: Front, extension: Extension, pairs: Int[Tensor, "pairs 2"]
    ) -> Float[Tensor, "taps pairs"]:
        """How badly pairs fit at each tap, in the pairs' order."""
        found = extension.hidden.new_full((len(self.spans), len(pairs)), torch.inf)
        for part, attended in self.block.of_pairs(front, extension, pairs):
            vectors = self._vectors(extension.hidden[pairs[part, 1]], attended)
            for row, (tap, span) in zip(found, self.spans.items(), strict=True):
                row[part] = _misfit(span, vectors[tap])
        return found

    def _vectors(
        self, hidden: Float[Tensor, "rows width"], attended: Float[Tensor, "rows inputs"]
    ) -> dict[Tap, Tensor]:
        """What enters the taps, of rows whose attention output is known."""
        adapter = self.block.adapter
        hidden = adapter.after_attention(0, hidden, attended)
        inner = adapter.mlp_input(0, hidden)
        activated, hidden = adapter.through_mlp(0, hidden, inner)
        vectors = {
            adapter.tap(0, ATTENTION_OUTPUT): attended,
            adapter.tap(0, MLP): inner,
            adapter.tap(0, MLP_OUTPUT): activated,
        }
        if adapter.num_blocks > 1:
            vectors[adapter.tap(1, QKV)] = adapter.attention_input(1, hidden)
        return vectors


def _misfit(span: Span, vectors: Tensor) -> Tensor:
    """How badly vectors fit: the logarithm of the residual, or of the leverage where there is no residual."""
    return span.log_leverage(vectors) if span.saturated else span.ratio(vectors).clamp(min=1e-30, max=1e30).log()
