"""When the rank is full: grow prefixes by leverage instead of residual (chapter 7).

With as many distinct prefixes as the model is wide no vector lies outside the span any more. The spectrum still decays
over orders of magnitude, and a true row leans less on the weak directions than a false one: its leverage stands out
from that of all the other extensions tried at the same position. What stands out is measured in robust standard
deviations of the logarithm; nothing is fixed beforehand but how often chance alone may do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from dager_tutorial.server.decoder.tree import Extension, Front, TreeSearch
from dager_tutorial.models.tap import MLP, QKV
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.first_input import FirstInput
from dager_tutorial.server.subspace import Span
from dager_tutorial.server.token_filter import Candidates, first_vectors

# Of all extensions tried at one position, chance alone may let this many pass.
FALSE_ALARMS = 0.01
# Extensions carried through the MLP, for each that was kept before; and how many others tell what is usual.
CARRIED, SAMPLE = 16, 512


class LeverageSearch(TreeSearch):
    """Keeps the extensions whose leverage at the MLP and in block 1 stands out from all others.

    Args:
        adapter: The architecture.
        spans: Spans of the taps (block, kind): block 0's MLP or block 1's query, key and value.
        candidates: Tokens that may stand at each position.
        widest: How many prefixes of one length are kept at most.
        memory: Bytes that intermediate results may take.
        deadline: Value of `time.perf_counter` after which the search stops, or None.
        seed: Seed of the sample of usual extensions.
        progress: Called with the number of prefixes kept so far and None.
    """

    def __init__(
        self,
        adapter: DecoderAdapter,
        spans: Mapping[tuple[int, str], Span],
        candidates: Candidates,
        *,
        widest: int,
        memory: int,
        deadline: float | None = None,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.mlp = spans.get((0, MLP))
        self.next_block = spans.get((1, QKV)) if adapter.num_blocks > 1 else None
        self.generator = torch.Generator().manual_seed(seed)
        self.batch_tokens = torch.cat(candidates.tokens).unique()
        none = torch.zeros(adapter.num_heads * adapter.head_width, 0, device=adapter.first_input.tokens.device)
        super().__init__(
            adapter,
            candidates,
            none,
            expected_rows=None,
            widest=widest,
            memory=memory,
            deadline=deadline,
            progress=progress,
        )

    def _longest_repeat(self) -> int:
        return 0  # a repeated first token cannot be told from one, and there is no count of rows to tell

    def select(self, front: Front, extension: Extension) -> tuple[Tensor, Tensor]:
        """Choose the extensions that stand out; their ratio is the share of the deviation that chance explains."""
        if front.nodes:
            everyone = torch.ones(len(front.nodes), len(extension.tokens), device=extension.tokens.device)
            pairs = everyone.nonzero()
        else:
            pairs = self._beginnings(extension)
        tried, first = self._mlp_leverages(front, extension, pairs)
        usual_first, usual_second = self._usual(front, extension)
        if not len(tried) or not len(usual_first):
            return tried[:0], first[:0]
        count = len(first) if self.mlp is None else CARRIED * (len(front.nodes) + 8)
        carried = first.argsort()[:count]
        second = self._block_leverages(front, extension, tried[carried])
        usual = standardised(usual_first, usual_first) + standardised(usual_second, usual_second)
        total = standardised(first[carried], usual_first) + standardised(second, usual_second)
        deviation = standardised(total, usual)
        needed = chance_quantile(FALSE_ALARMS / len(pairs))
        chosen = (deviation <= -needed) & (not self.late)  # past the deadline the last ones were not computed
        return tried[carried[chosen]], -needed / deviation[chosen]

    def _usual(self, front: Front, extension: Extension) -> tuple[Tensor, Tensor]:
        """Log leverages of pairs that are hardly ever true: the batch's tokens, of any position, after any prefix."""
        draws = torch.randint(len(self.batch_tokens), (SAMPLE,), generator=self.generator)
        tokens = self.batch_tokens[draws.to(extension.tokens.device)]
        places = torch.randint(max(1, len(front.nodes)), (SAMPLE,), generator=self.generator).sort().values
        if not front.nodes:
            places = torch.full_like(places, -1)
        pairs = torch.stack([places, torch.arange(SAMPLE)], 1).to(tokens.device)
        others = self._extension(extension.position, tokens)
        first = self._mlp_leverages(front, others, pairs, all_pairs=False)[1]
        return first, self._block_leverages(front, others, pairs)[: len(first)]

    def _mlp_leverages(
        self, front: Front, extension: Extension, pairs: Tensor, *, all_pairs: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The pairs that were tried before the deadline and their log leverages at the MLP's input (float32)."""
        adapter = self.adapter
        tried, leverages = [pairs[:0]], [torch.empty(0, device=pairs.device)]
        whole = all_pairs and bool(front.nodes)
        chunks = self._everyone(front, extension) if whole else self._attended(front, extension, pairs)
        for part, attended in chunks:
            hidden = adapter.after_attention(0, extension.hidden[pairs[part, 1]], attended)
            inner = adapter.mlp_input(0, hidden)
            tried.append(pairs[part])
            leverages.append(inner.new_zeros(len(part)) if self.mlp is None else self.mlp.log_leverage(inner))
        return torch.cat(tried), torch.cat(leverages)

    def _everyone(self, front: Front, extension: Extension) -> Iterator[tuple[Tensor, Tensor]]:
        """Like `_attended` for all pairs, without a copy of the cache for each of them."""
        adapter = self.adapter
        count = len(extension.tokens)
        entry = 4 * count * (3 * adapter.num_heads * (extension.position + 1) + 8 * adapter.hidden_size)
        for places in torch.arange(len(front.nodes), device=front.keys.device).split(max(1, self.memory // entry)):
            if self.late:
                return
            choice = torch.arange(count, device=places.device)
            yield (
                (places[:, None] * count + choice).flatten(),
                self._attended_by_all(front, extension, places).flatten(0, 1),
            )

    def _block_leverages(self, front: Front, extension: Extension, pairs: Tensor) -> Tensor:
        """Log leverages at block 1's query, key and value (float32, pairs)."""
        adapter = self.adapter
        leverages = torch.zeros(len(pairs), device=pairs.device)
        if self.next_block is None:
            return leverages
        for part, attended in self._attended(front, extension, pairs):
            hidden = adapter.after_attention(0, extension.hidden[pairs[part, 1]], attended)
            hidden = adapter.after_mlp(0, hidden, adapter.mlp_input(0, hidden))
            leverages[part] = self.next_block.log_leverage(adapter.attention_input(1, hidden))
        return leverages


def filter_by_leverage(source: FirstInput, span: Span, *, late: Callable[[], bool]) -> Candidates:
    """Candidates where even block 0 is full: the tokens whose leverage stands out from the vocabulary's.

    Args:
        source: Factors of block 0's attention input.
        span: Span of block 0's query, key and value gradient.
        late: Tells when to stop.

    Returns:
        The candidates of each position up to the first that has none.
    """
    vocabulary = torch.arange(len(source.tokens), device=source.tokens.device)
    needed = chance_quantile(FALSE_ALARMS / len(vocabulary))
    found: list[Tensor] = []
    for position in range(1 if source.positions is None else len(source.positions)):
        parts = [
            span.log_leverage(first_vectors(source, part, torch.full_like(part, position)))
            for part in vocabulary.split(8192)
        ]
        leverages = torch.cat(parts)
        tokens = vocabulary[standardised(leverages, leverages) <= -needed]
        if not len(tokens) or late():
            break
        found.append(tokens)
    return Candidates(tuple(found) or (vocabulary[:0],), every_position=source.positions is None)


def standardised(values: Tensor, usual: Tensor) -> Tensor:
    """Deviations from the median of `usual` in robust standard deviations (float32, like `values`)."""
    centre = usual.median()
    spread = 1.4826 * (usual - centre).abs().median()
    return (values - centre) / spread.clamp(min=1e-6)


def chance_quantile(rate: float) -> float:
    """The standard normal's upper quantile for a rate below a half."""
    return float(torch.special.ndtri(torch.tensor(1.0 - rate, dtype=torch.float64)))
