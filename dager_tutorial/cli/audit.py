"""`dager audit`: what an update gives away, as one page for people who do not run notebooks."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from dager_tutorial import __version__, files
from dager_tutorial.cli import display, output
from dager_tutorial.cli.head import HeadOptions
from dager_tutorial.cli.options import (
    BatchOptions,
    ClientOptions,
    Completion,
    Labels,
    ModelOptions,
    OutputOptions,
    Seed,
    TimeBudget,
    flattened,
)
from dager_tutorial.cli.parties import Before, Computed, attacked, computed, limits_of, received
from dager_tutorial.cli.progress import progress, stoppable
from dager_tutorial.cli.training import TrainingOptions
from dager_tutorial.cli.typed import typed
from dager_tutorial.errors import DagerError

if TYPE_CHECKING:
    from dager_tutorial.client.batch import Truth
    from dager_tutorial.evaluation.ladder import Rung
    from dager_tutorial.models.heads import Head
    from dager_tutorial.models.language_model import LanguageModel
    from dager_tutorial.reconstruction import Reconstruction
    from dager_tutorial.report.facts import About, Facts
    from dager_tutorial.report.sent import Source
    from dager_tutorial.server.budget import AttackConfig
    from dager_tutorial.update import Update

PAGE = Path("audit.html")
LEAST_SECONDS, MEMORY_MB = 10.0, 64  # for a changed update, whose copy stands beside the one that was sent
SEVERITIES = {"severe": "bold red", "serious": "bold yellow", "open": "bold blue"}


@dataclass(frozen=True)
class ReportOptions:
    """What the report holds, and where it goes."""

    truth: Annotated[
        str | None, Option("--truth", help="The owner's texts, a TSV file: compared with what was found, afterwards.")
    ] = None
    out: Annotated[
        Path | None, Option("--out", "-o", callback=output.writable, help=f"The page to write, {PAGE} by default.")
    ] = None
    show_texts: Annotated[
        bool, Option("--show-texts", help="Show the recovered texts and labels; by default they are hidden.")
    ] = False
    changes: Annotated[
        bool, Option("--changes/--no-changes", help="Change the update (noise, rounding, ...) and attack each again.")
    ] = True
    change_seconds: Annotated[
        float | None,
        Option("--change-seconds", min=0.1, help="Seconds for each of them; by default twice those of the first."),
    ] = None

    def seconds(self, first: float) -> float:
        """What the attack on one changed update may take.

        Args:
            first: Seconds that the attack on the update itself took.
        """
        return self.change_seconds or max(LEAST_SECONDS, 2 * first)

    def page(self) -> Path:
        """Where the page goes. One that nobody named takes the place of no other.

        Raises:
            DagerError: It is there already.
        """
        if self.out is None and PAGE.exists():
            raise DagerError(f"{PAGE} is there already: move it, or name the page to write with --out")
        return self.out or files.writable(PAGE)


class Case(NamedTuple):
    """What is audited, and all that is known of it."""

    model: LanguageModel
    update: Update
    source: Source
    head: Head | None
    truth: Truth | None


@flattened
def audit(
    *,
    context: typer.Context,
    update: Annotated[
        Path | None, Argument(metavar="[UPDATE]", help="An update file or a checkpoint; else --data or --text.")
    ] = None,
    model: ModelOptions,
    report: ReportOptions,
    batch: BatchOptions,
    label: Labels = None,
    client: ClientOptions,
    training: TrainingOptions,
    head: HeadOptions,
    before: Before = None,
    completion: Completion = True,
    time_budget: TimeBudget = None,
    seed: Seed = 0,
    results: OutputOptions,
) -> None:
    """Write a page that says what an update gives away, and what would stop it: of a file, or of a model and texts."""
    page, limits = report.page(), limits_of(seed, time_budget, completion)
    if update is None:
        _check_live(report, head, before)
        case = _live(computed(model, *batch.draw(seed, label), client.config(seed), training))
    else:
        _check_file(report, batch, client, training)
        case = _received(update, model, before, report, client, head, seed)
    facts = _audited(case, report, limits, _about(context, case, live=update is None, shown=report.show_texts))
    from dager_tutorial.report.page import page as written

    output.write_text(page, written(facts))
    results.finish(facts.to_json(), *_shown(facts), Text(f"page: {page}", "dim"))


def _check_live(report: ReportOptions, head: HeadOptions, before: Path | None) -> None:
    """Refuse what belongs to an update file."""
    if report.truth is not None or before is not None or head != HeadOptions():
        raise DagerError("--truth, --before, --trained, --classes and --head belong to an update file: name it, too")


def _check_file(report: ReportOptions, batch: BatchOptions, client: ClientOptions, training: TrainingOptions) -> None:
    """Refuse what belongs to an update that is yet to be computed."""
    known = ClientOptions(task=client.task, max_length=client.max_length) if report.truth else ClientOptions()
    if batch != BatchOptions() or training != TrainingOptions() or client != known:
        raise DagerError(
            "an update file has its batch and its training behind it: leave out --data, --text and the client's "
            "options; the owner's texts go with --truth FILE (and --task, --max-length)"
        )


def _live(case: Computed) -> Case:
    """The update that a client would send, computed here, and what the client knows."""
    from dager_tutorial.report.sent import Source
    from dager_tutorial.stopwatch import return_memory

    return_memory()
    return Case(case.model, case.update, Source(), case.head, case.truth)


def _received(
    path: Path,
    model: ModelOptions,
    before: Path | None,
    report: ReportOptions,
    client: ClientOptions,
    head: HeadOptions,
    seed: int,
) -> Case:
    """An update from a file, and what the owner says of it."""
    known = head.load(seed)
    texts = None if report.truth is None else _owners(report.truth)
    language_model, update = received(path, model, before)
    from dager_tutorial.client.batch import truth_of
    from dager_tutorial.report.sent import source_of

    truth = None if texts is None else truth_of(language_model, *texts, config=client.config(seed))
    return Case(language_model, update, source_of(path), known, truth)


def _owners(name: str) -> tuple[list[str], list[int]]:
    """All texts of a file, and their labels."""
    from dager_tutorial.data import load_texts

    examples = load_texts(name)
    return [each.text for each in examples], [each.label for each in examples]


def _audited(case: Case, report: ReportOptions, limits: AttackConfig, about: About) -> Facts:
    """Attack, put together what is known, then try changes."""
    from dager_tutorial.evaluation.ladder import taken_for_true
    from dager_tutorial.report.facts import gather, with_ladder

    found = attacked(case.model, case.update, case.head, limits)
    facts = gather(
        case.model,
        case.update,
        found,
        source=case.source,
        about=about,
        truth=case.truth,
        show_texts=report.show_texts,
    )
    goal = case.truth or taken_for_true(case.model, found)
    if goal is None or not report.changes:
        return facts
    limits = replace(limits, time_budget=report.seconds(found.seconds["total"]), memory_mb=MEMORY_MB)
    return with_ladder(facts, _climbed(case, goal, found, limits))


def _climbed(case: Case, goal: Truth, found: Reconstruction, limits: AttackConfig) -> tuple[Rung, ...]:
    """The ladder; after Ctrl-C what was tried so far."""
    from dager_tutorial.evaluation.changes import usual_changes
    from dager_tutorial.evaluation.ladder import climb
    from dager_tutorial.stopwatch import return_memory

    rungs, changes = [], usual_changes(case.model, case.update)
    return_memory()
    with progress() as advance, stoppable() as stop:
        tried = climb(
            case.model,
            case.update,
            goal,
            changes=changes,
            unchanged=found,
            head=case.head,
            config=replace(limits, stop=stop),
            progress=advance,
        )
        for rung in tried:
            if stop():
                break
            rungs.append(rung)
            return_memory()
    return tuple(rungs)


def _about(context: typer.Context, case: Case, *, live: bool, shown: bool) -> About:
    """Command, date and versions."""
    import torch
    import transformers

    from dager_tutorial.report.facts import About

    versions = {
        "dager-tutorial": __version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "device": case.model.device.type,
        "threads": str(torch.get_num_threads()),
    }
    return About(typed(context, shown=shown), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", versions, live)


def _shown(facts: Facts) -> list[Text | Table]:
    """What the terminal says: the verdict and the ladder, and no text of the batch."""
    said = facts.headline
    lines: list[Text | Table] = [
        Text.assemble((said.sentence, SEVERITIES[said.severity]), f"\n{said.reason}"),
        Text(f"{facts.given.status}: {facts.given.diagnosis}", "dim"),
    ]
    return [*lines, _ladder_table(facts.ladder)] if facts.ladder else lines


def _ladder_table(rungs: tuple[Rung, ...]) -> Table:
    table = display.headed("words", "exact", "proven", "status", left=("status",))
    table.add_column("change", overflow="fold")
    for rung in rungs:
        least = ">= " if rung.late else ""
        shares = (f"{least}{100 * share:.0f} %" for share in (rung.words, rung.exact, rung.confirmed))
        table.add_row(*shares, rung.status, rung.name)
    return table
