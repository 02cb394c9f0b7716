"""How much hangs on the attack's constants: each is halved and doubled, and a few batches attacked again.

Chapter `11_limits`.

The batches are small, of the project's own texts, and chosen so that every kind of search runs: decoders with learned
and with rotary positions, low precision, more prefixes than the model is wide, both encoders' stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from transformers import GPT2Config

from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.step import play
from dager_tutorial.data import load_texts, sample_batch
from dager_tutorial.evaluation.timing import timed, warm_up
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig, Progress
from dager_tutorial.server.constant_table import ConstantRecord, constant_table
from dager_tutorial.server.constants import varied
from dager_tutorial.update import Update
from dager_tutorial.zoo.checkpoint import random_backbone
from dager_tutorial.zoo.names import load_model

FACTORS = (0.5, 2.0)
TIME_BUDGET = 60.0
"""Seconds after which an attack with a changed constant is stopped."""


class Case(NamedTuple):
    """One batch of the set.

    Attributes:
        name: What it is, in a few words.
        model: The model.
        update: What the client sent.
        truth: What it kept.
    """

    name: str
    model: LanguageModel
    update: Update
    truth: Truth


@dataclass(frozen=True)
class SensitivityRun:
    """What the attack made of all cases with one constant changed.

    Attributes:
        constant: Its name; empty for the run with all of them as they are.
        value: Its value in this run.
        origin: Where its usual value comes from.
        exact: Texts recovered exactly, of all cases together.
        texts: Number of texts in all cases together.
        false: Recovered sequences that are no text of their batch.
        false_confirmed: Those of them that are reported as confirmed.
        changed: Names of the cases whose status or number of exact or false texts is not the usual one.
        seconds: Seconds of processor time that the attacks took.
    """

    constant: str
    value: float
    origin: str
    exact: int
    texts: int
    false: int
    false_confirmed: int
    changed: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, in the order of the attributes."""
        return asdict(self) | {"changed": list(self.changed)}


class _Result(NamedTuple):
    status: str
    exact: int
    false: int
    false_confirmed: int
    seconds: float


def bench_sensitivity(
    cases: Sequence[Case] | None = None,
    table: Sequence[ConstantRecord] | None = None,
    *,
    progress: Progress | None = None,
) -> Iterator[SensitivityRun]:
    """Attack with every constant as it is, then with each halved and doubled.

    Args:
        cases: What to attack; None for `usual_cases()`.
        table: Which constants to change; None for all of `constant_table()`.
        progress: Called with "constants", how many runs are done and the total.

    Yields:
        The run with all constants as they are, then two for each constant.

    Raises:
        ModelError: A model of the cases cannot be loaded.
    """
    cases = usual_cases() if cases is None else cases
    table = constant_table() if table is None else table
    warm_up(cases[0].model.device)
    usual = [_attacked(case) for case in cases]
    yield _run(ConstantRecord("", 0, "", ""), 0, cases, usual, usual)
    changes = [(record, changed(record.value, factor)) for record in table for factor in FACTORS]
    for done, (record, value) in enumerate(changes):
        if progress is not None:
            progress("constants", done, len(changes))
        with varied(**{record.name: value}):
            yield _run(record, value, cases, [_attacked(case) for case in cases], usual)


def changed(value: float, factor: float) -> float:
    """A constant times a factor; a whole number stays one, and at least 1.

    >>> changed(5, 0.5), changed(1, 0.5), changed(0.3, 2.0)
    (2, 1, 0.6)
    """
    return max(1, int(value * factor)) if isinstance(value, int) else value * factor


def usual_cases() -> list[Case]:
    """The fixed set: seven batches of the project's texts, drawn with seed 0."""
    gpt2, smollm2 = load_model("random:gpt2", blocks=3), load_model("smollm2-135m", blocks=4)
    minilm = load_model("minilm-l6")
    return [
        _case("GPT-2, B = 4", gpt2, "reviews", 4),
        _case("SmolLM2, B = 4", smollm2, "reviews", 4),
        _case("SmolLM2, B = 8, next token", smollm2, "grammar", 8, task="next_token"),
        _case("SmolLM2, B = 2, bfloat16", smollm2, "grammar", 2, dtype="bfloat16"),
        _case("narrow GPT-2, B = 8, saturated", narrow_gpt2(smollm2), "reviews", 8, share="all"),
        _case("MiniLM, B = 4", minilm, "reviews", 4),
        _case("MiniLM, B = 8", minilm, "grammar", 8),
    ]


def narrow_gpt2(like: LanguageModel) -> LanguageModel:
    """A random GPT-2 of 96 dimensions, fewer than eight reviews have prefixes.

    Args:
        like: A model whose tokenizer it takes.
    """
    config = GPT2Config(
        vocab_size=len(like.tokenizer), n_embd=96, n_layer=3, n_head=6, bos_token_id=None, eos_token_id=None
    )
    return LanguageModel("narrow GPT-2", random_backbone(config, seed=0), like.tokenizer)


def _case(name: str, model: LanguageModel, data: str, size: int, **options: Any) -> Case:
    texts, labels = sample_batch(load_texts(data), size, seed=0)
    return Case(name, model, *play(model, texts, labels, config=ClientConfig(**{"share": "attention"} | options)))


def _attacked(case: Case) -> _Result:
    limits = AttackConfig(time_budget=TIME_BUDGET, complete=False)
    spent = timed(lambda: attack(case.model, case.update, config=limits))
    found = spent.result
    true, confirmed = set(case.truth.sequences), set(found.confirmed)
    exact = sum(ids in found.sequences for ids in case.truth.sequences)
    false = len(set(found.sequences) - true)
    return _Result(found.status.value, exact, false, len(confirmed - true), spent.cpu_seconds)


def _run(
    record: ConstantRecord, value: float, cases: Sequence[Case], results: list[_Result], usual: list[_Result]
) -> SensitivityRun:
    differs = (case.name for case, now, before in zip(cases, results, usual, strict=True) if now[:4] != before[:4])
    return SensitivityRun(
        constant=record.name,
        value=value,
        origin=record.origin,
        exact=sum(result.exact for result in results),
        texts=sum(len(case.truth.sequences) for case in cases),
        false=sum(result.false for result in results),
        false_confirmed=sum(result.false_confirmed for result in results),
        changed=tuple(differs),
        seconds=sum(result.seconds for result in results),
    )


def markdown_table(runs: Sequence[SensitivityRun]) -> str:
    """The table as Markdown: one row for each constant, its meaning and what halving and doubling change.

    Args:
        runs: What `bench_sensitivity` yields.
    """
    usual, *others = runs
    records = {record.name: record for record in constant_table()}
    lines = ["| constant | value | meaning | origin | halved | doubled |", "|---|---|---|---|---|---|"]
    for half, double in zip(others[::2], others[1::2], strict=True):
        record = records[half.constant]
        cells = (f"`{record.name}`", f"{record.value:.3g}", record.meaning, record.origin)
        lines.append(f"| {' | '.join((*cells, _cell(half, usual), _cell(double, usual)))} |")
    return "\n".join(lines) + "\n"


def _cell(run: SensitivityRun, usual: SensitivityRun) -> str:
    """What changed, in a few words; a run much slower or faster than usual says so."""
    said = []
    if run.changed:
        said.append(f"{run.exact} of {run.texts} exact, {run.false} false ({', '.join(run.changed)})")
    if run.false_confirmed:
        said.append(f"**{run.false_confirmed} confirmed and false**")
    if not 0.5 <= run.seconds / usual.seconds <= 2:
        said.append(f"{run.seconds / usual.seconds:.1f} x the time")
    return "; ".join(said) or "no change"
