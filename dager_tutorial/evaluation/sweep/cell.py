"""One cell: capture an update, attack it, score what came back, and put all of it into one tidy row.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from dager_tutorial import __version__
from dager_tutorial.client.adapters import TRAINED_ON, LoraConfig, hand_out
from dager_tutorial.client.batch import Truth
from dager_tutorial.client.defended import Defended, play_defended
from dager_tutorial.client.step import head_of
from dager_tutorial.data import load_texts, sample_batch
from dager_tutorial.evaluation.leakage import false_confirmed
from dager_tutorial.evaluation.metrics import score, wanted
from dager_tutorial.evaluation.rows import distinct_rows
from dager_tutorial.evaluation.sweep.attacker import Received
from dager_tutorial.evaluation.sweep.cells import Cell
from dager_tutorial.evaluation.sweep.devices import claimed, forget_peaks, peaks, sparing
from dager_tutorial.evaluation.sweep.records import Plan, plan_of
from dager_tutorial.evaluation.timing import timed, warm_up
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.zoo.names import load_model


@dataclass(frozen=True)
class Work:
    """How cells are done; the same for all of them, and no part of what they are.

    Attributes:
        device: `cpu`, `cuda` or `mps`; each worker takes a GPU of its own.
        texts: Folder of TSV files by the names of corpora, looked into before any other source.
        threads: CPU threads of a worker; None for what the pool gives it.
    """

    device: str = "cpu"
    texts: str | None = None
    threads: int | None = None

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Do a cell.

        Args:
            cell: See `cells`.

        Returns:
            What was measured, by column.

        Raises:
            DagerError: The cell cannot be done.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        plan, device = plan_of(cell), claimed(self.device)
        texts, labels = self.batch(cell)
        model = _loaded(cell["model"], device, plan)
        warm_up(model.device)
        forget_peaks(model.device)
        with sparing(model):
            client = timed(lambda: _sent(plan, model, texts, labels))
        update, truth, head = (
            client.result.update,
            client.result.truth,
            head_of(plan.client, client.result.truth.labels),
        )
        spent = timed(lambda: plan.attacker.run(Received(model, update, head, truth), plan.options))
        found, stages = spent.result, spent.result.reconstruction.seconds
        return {
            **_scores(found.reconstruction, truth, causal=adapter_for(model.network).causal),
            **found.columns,
            **{f"sent.{name}": value for name, value in client.result.to_json().items()},
            "n_parameters": model.network.num_parameters(),
            "seconds.client": client.seconds,
            "seconds.attack": spent.seconds,
            "seconds.cpu": spent.cpu_seconds,
            **{f"seconds.{stage}": seconds for stage, seconds in stages.items() if stage != "total"},
            **peaks(model.device),
            **_machine(model.device),
        }

    def batch(self, cell: Cell) -> tuple[list[str], list[int]]:
        """The texts and labels of a cell.

        Args:
            cell: Names the corpus, the size and the seed.
        """
        return sample_batch(_corpus(cell["corpus"], self.texts), cell["batch_size"], cell["seed"])


def _sent(plan: Plan, model: LanguageModel, texts: list[str], labels: list[int]) -> Defended:
    """Play the client."""
    options: dict[str, Any] = {"config": plan.client, "training": plan.training, "protection": plan.protection}
    return play_defended(model, texts, labels, **options)


def _scores(found: Reconstruction, truth: Truth, *, causal: bool) -> dict[str, Any]:
    """What is known of the batch, and what came back of it."""
    points, there = score(found, truth), set(wanted(found, truth))
    numbers = {name: value for name, value in points.to_json().items() if name not in ("batch_size", "hidden_size")}
    return {
        "status": found.status.value,
        **numbers,
        "false": len(set(found.sequences) - there),
        "false_confirmed": false_confirmed(found, truth),
        "rows": distinct_rows(truth.sequences, causal=causal),
        "rank": next(iter(found.ranks.values()), None),
        "width": points.hidden_size,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the cell."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "version.dager_tutorial": __version__,
        "version.torch": torch.__version__,
        "version.transformers": transformers.__version__,
        "version.python": platform.python_version(),
    }


@functools.lru_cache(maxsize=8)
def _corpus(name: str, folder: str | None) -> Any:
    """A corpus: from the folder if it is there, else by its name or path."""
    local = Path(folder or "", f"{name}.tsv")
    return load_texts(local if folder and local.is_file() else name)


_kept: dict[tuple[Any, ...], LanguageModel] = {}
"""The model of the last cell: it stays loaded for the cells that follow."""


def _loaded(name: str, device: str, plan: Plan) -> LanguageModel:
    """The model of a cell, under the adapter that the server hands out."""
    key = (name, device, tuple(sorted(plan.model.items())), plan.adapter)
    if key not in _kept:
        _kept.clear()  # before the next one is drawn: there may be no room for two
        _kept[key] = _handed_out(load_model(name, device=device, **plan.model), plan.adapter)
    return _kept[key]


def _handed_out(model: LanguageModel, adapter: LoraConfig | None) -> LanguageModel:
    if adapter is None:
        return model
    public = [example.text for example in load_texts("reviews")]  # the project's own: nobody's secret
    return hand_out(model, adapter, texts=public[: TRAINED_ON * adapter.steps])
