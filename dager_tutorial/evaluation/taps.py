"""What each kind of gradient gives away alone: one update, of which only a part is shown to the server.

Chapter `11_limits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.evaluation.accuracy import Batch
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, MLP_OUTPUT, QKV, Tap
from dager_tutorial.models.training import filled_and_masked
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Progress
from dager_tutorial.server.embedding_rows import named_positions, named_tokens
from dager_tutorial.server.evidence import Evidence, evidence_of
from dager_tutorial.status import Status
from dager_tutorial.update import Update

Gradients = dict[str, Tensor]

MAPS = {"query, key, value": QKV, "attention output": ATTENTION_OUTPUT, "MLP input": MLP}
"""The linear maps with as many inputs as the model is wide, by the name of their row in the table."""


@dataclass(frozen=True)
class TapRun:
    """What one part of an update gives away.

    Attributes:
        model: The model's name.
        task: What the client trained.
        batch_size: Number of texts.
        seed: Seed that drew them.
        shared: Which part was shown.
        numbers: How many numbers it has.
        tokens: Share of the batch's distinct input tokens that embedding rows name; None where they name none.
        extra: How many tokens they name besides.
        length: The longest text's length, as position rows name it; None where they name none.
        true_rows: Share of the batch's rows that block 0's map of this kind holds; None where the part is no such map.
        false_rows: The same of rows whose last token was replaced by another one of the batch.
        exact: Share of the texts that the search finds exactly.
        status: The attack's status.
    """

    model: str
    task: str
    batch_size: int
    seed: int
    shared: str
    numbers: int
    tokens: float | None
    extra: int | None
    length: int | None
    true_rows: float | None
    false_rows: float | None
    exact: float
    status: str

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the attributes."""
        return asdict(self)


def bench_taps(
    model: LanguageModel, batches: Iterable[Batch], *, task: str = "classification", progress: Progress | None = None
) -> Iterator[TapRun]:
    """Attack parts of the updates of some batches.

    Args:
        model: A causal model.
        batches: The batches.
        task: `classification` or `next_token`.
        progress: Called with the stage, what is done and the total or None.

    Yields:
        For each batch one record a part.
    """
    for batch in batches:
        update, truth = play(model, batch.texts, batch.labels, config=ClientConfig(task=task))
        for shared, part in parts_of(adapter_for(model.network), update).items():
            yield _run(model, batch, truth, shared, part, progress)


def parts_of(adapter: Adapter, update: Update) -> dict[str, Gradients]:
    """The gradients of an update by kind, then all but the embeddings, then all.

    Args:
        adapter: The architecture.
        update: What a client sent, all of it.
    """
    body = update.for_backbone(adapter.network)
    head = update.for_head(adapter.network)
    tables = [adapter.first_input.tokens, *(adapter.position_table or ())[:1]]
    own = {id(each): name for name, each in adapter.network.named_parameters()}
    embeddings = [own[id(table)] for table in tables]
    named: dict[str, Iterable[str]] = {
        "token embedding": embeddings[:1],
        "position embedding": embeddings[1:],
        "norms": [name for name in body if body[name].ndim == 1 and ("ln_" in name or "norm" in name)],
        **{label: _maps(adapter, kind) for label, kind in MAPS.items()},
        "MLP output": _maps(adapter, MLP_OUTPUT),
        "embeddings, attention output": [*embeddings, *_maps(adapter, ATTENTION_OUTPUT)],
        "embeddings, MLP input": [*embeddings, *_maps(adapter, MLP)],
        "all but embeddings": body.keys() - set(embeddings),
        "all": body.keys(),
    }
    parts = {label: {name: body[name] for name in names} for label, names in named.items()}
    return {label: part for label, part in ({"head": head} | parts).items() if part}


def _maps(adapter: Adapter, kind: str) -> list[str]:
    """Weights of the maps of a kind in all blocks."""
    return [name for block in range(adapter.num_blocks) for name in adapter.tap(block, kind).parameters]


def _run(
    model: LanguageModel, batch: Batch, truth: Truth, shared: str, part: Gradients, progress: Progress | None
) -> TapRun:
    """What a part of an update gives away."""
    if shared == "head":  # an update of a head alone is none of the backbone: nothing can be read by rows
        return TapRun(
            *_about(model, batch, truth, shared, part), None, None, None, None, None, 0.0, Status.NO_SIGNAL.value
        )
    update = Update(part)
    evidence = evidence_of(model, update)
    found = attack(model, update, config=AttackConfig(complete=False), progress=progress)
    true = {token for text in truth.sequences for token in text}
    named = named_tokens(evidence)
    tokens = None if named is None else set(named.tolist())
    tap = evidence.adapter.tap(0, MAPS[shared]) if shared in MAPS else None
    held, fooled = (None, None) if tap is None else _selectivity(evidence, truth.sequences, tap)
    exact = sum(text in found.sequences for text in truth.sequences) / len(truth.sequences)
    return TapRun(
        *_about(model, batch, truth, shared, part),
        None if tokens is None else len(true & tokens) / len(true),
        None if tokens is None else len(tokens - true),
        named_positions(evidence),
        held,
        fooled,
        exact,
        found.status.value,
    )


def _about(
    model: LanguageModel, batch: Batch, truth: Truth, shared: str, part: Gradients
) -> tuple[str, str, int, int, str, int]:
    """What was shown of which batch."""
    numbers = sum(each.numel() for each in part.values())
    return model.name, truth.task, len(batch.texts), batch.seed, shared, numbers


def _selectivity(evidence: Evidence, texts: Sequence[tuple[int, ...]], tap: Tap) -> tuple[float | None, float | None]:
    """The shares of true rows and of such with a wrong last token that a tap's span holds."""
    span = evidence.span(tap)
    if span is None:
        return None, None
    prefixes = sorted({text[: end + 1] for text in texts for end in range(len(text))}, key=len)
    tokens, generator = sorted({token for text in texts for token in text}), torch.Generator().manual_seed(0)
    drawn = [tokens[place] for place in torch.randint(len(tokens), (len(prefixes),), generator=generator).tolist()]
    wrong = [(*prefix[:-1], token) for prefix, token in zip(prefixes, drawn, strict=True)]
    false = sorted(set(wrong) - set(prefixes), key=len)
    held = [span.holds(_last_rows(evidence.adapter, some, tap)).float().mean().item() for some in (prefixes, false)]
    return held[0], held[1]


def _last_rows(adapter: Adapter, prefixes: Sequence[tuple[int, ...]], tap: Tap) -> Tensor:
    """What enters a tap at the last token of each prefix, in their order."""
    device, rows = adapter.first_input.tokens.device, []
    for start in range(0, len(prefixes), 64):
        part = prefixes[start : start + 64]
        ids, mask = filled_and_masked(part, 0, device=device)
        vectors = adapter.tap_inputs(ids, mask, [tap])[tap]
        rows.append(vectors[torch.arange(len(part)), mask.sum(1) - 1])
    return torch.cat(rows)


def markdown_table(runs: Sequence[TapRun]) -> str:
    """The table as Markdown: one row for each part, means over the seeds of a cell.

    Args:
        runs: What `bench_taps` yields.
    """
    cells: dict[tuple[str, str, int, str], list[TapRun]] = {}
    for run in runs:
        cells.setdefault((run.model, run.task, run.batch_size, run.shared), []).append(run)
    lines = [
        "| model | loss | B | shared alone | numbers | tokens named (besides) | longest text named | "
        "true rows held | false rows held | texts exact | status |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, task, size, shared), cell in cells.items():
        named = _mean([run.tokens for run in cell])
        named += f" ({max(run.extra or 0 for run in cell)})" if named else ""
        lengths = ", ".join(str(run.length) for run in cell if run.length is not None)
        rows = [_mean([run.true_rows for run in cell]), _mean([run.false_rows for run in cell])]
        states = ", ".join(dict.fromkeys(f"`{run.status}`" for run in cell))
        what = [model, task.replace("_", " "), str(size), shared, f"{cell[0].numbers:,}", named, lengths, *rows]
        lines.append(f"| {' | '.join([*what, _mean([run.exact for run in cell]), states])} |")
    return "\n".join(lines) + "\n"


def _mean(shares: Sequence[float | None]) -> str:
    """The mean of what is there in per cent; empty where nothing is."""
    there = [share for share in shares if share is not None]
    return f"{100 * sum(there) / len(there):.1f} %" if there else ""
