"""The options of the command line: each list of them is a record, and stands here once.

`flattened` turns the records in a command's signature into its options, and hands it those built from the answers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from rich.console import RenderableType
from typer import Option

from dager_tutorial.cli import output
from dager_tutorial.cli.progress import waiting
from dager_tutorial.errors import DagerError, quote

if TYPE_CHECKING:
    from dager_tutorial.client.config import ClientConfig
    from dager_tutorial.evaluation.accuracy import Batch
    from dager_tutorial.models.language_model import LanguageModel

BATCH_SIZE = 8  # texts drawn from --data where --batch-size is not given

Blocks = Annotated[int | None, Option("--blocks", min=1, help="Keep only the model's first blocks.")]
Device = Annotated[Literal["cpu", "cuda", "mps"], Option("--device", help="Where to compute.")]
Dtype = Annotated[
    Literal["float32", "float64", "bfloat16", "float16"], Option("--dtype", help="The client's precision.")
]
Labels = Annotated[list[int] | None, Option("--label", help="Class of each --text, in order; 0, 1, 0, ...")]
Markdown = Annotated[
    Path | None, Option("--markdown", callback=output.writable, help="Write what is tabulated as Markdown.")
]
MaxLength = Annotated[int | None, Option("--max-length", min=1, help="Truncate texts to so many tokens.")]
Rows = Annotated[Path, Option("--rows", help="Folder of the rows; what is there already is not done again.")]
Seed = Annotated[int, Option("--seed", help="Seed of everything drawn: the batch, the head, the masks, the search.")]
Share = Annotated[
    str, Option("--share", help="Gradients sent: all, attention, or parameter names joined by commas, * for anything.")
]
Task = Annotated[
    Literal["classification", "next_token", "masked"],
    Option("--task", help="What the client trains: next_token needs a causal model, masked a bidirectional one."),
]
Threads = Annotated[int | None, Option("--threads", min=1, help="CPU threads; all cores by default.")]
Completion = Annotated[
    bool,
    Option("--completion/--no-completion", help="Weigh, search on and prove what was found; takes a client's step."),
]
Prompt = Annotated[str, Option("--prompt", help="What every text is known to begin with, as a template does.")]
TimeBudget = Annotated[float | None, Option("--time-budget", min=0.0, help="Seconds after which the search stops.")]


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the records in its signature, and hand it the records built from them.

    Args:
        command: A function of keywords only. Where one is annotated with a record (a frozen dataclass whose fields are
            annotated with options), the fields take its place, in their order; their defaults are those of a record
            that stands as default.

    Returns:
        The same function of options only, as typer wants it.

    Raises:
        ValueError: Two records have a field of the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    records: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, own in inspect.signature(command).parameters.items():
        parameters += _fields(own, records[name]) if name in records else [own.replace(annotation=hints[name])]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, record in records.items():
            given[name] = record(**{field.name: given.pop(field.name) for field in fields(record)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _fields(own: inspect.Parameter, record: Any) -> list[inspect.Parameter]:
    """A parameter for each field of a record."""
    hints = get_type_hints(record, include_extras=True)
    defaults = {field.name: own.empty if field.default is MISSING else field.default for field in fields(record)}
    defaults |= {} if own.default is own.empty else vars(own.default)
    return [
        inspect.Parameter(name, own.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in defaults.items()
    ]


@dataclass(frozen=True)
class ModelOptions:
    """The model that both sides know, and where to compute."""

    model: Annotated[str, Option("--model", "-m", help="Zoo name, Hugging Face id, local folder or random:<config>.")]
    model_seed: Annotated[int, Option("--model-seed", help="Seed of the weights of a random: model.")] = 0
    device: Device = "cpu"
    blocks: Blocks = None
    adapter: Annotated[Path | None, Option("--adapter", help="Folder of a LoRA adapter, as peft writes it.")] = None
    stream: Annotated[
        bool | None,
        Option(help="Read deeper blocks from disk each time they run; by default where the model is large for memory."),
    ] = None
    threads: Threads = None

    def load(self) -> LanguageModel:
        """Load the model. The first time this takes a while, and whoever watches is told so."""
        with waiting(f"loading {self.model}; the first time it is fetched and converted"):
            import torch

            from dager_tutorial.zoo.names import load_model

            if self.threads is not None:
                torch.set_num_threads(self.threads)
            load = functools.partial(load_model, self.model, device=self.device, seed=self.model_seed)
            return load(blocks=self.blocks, stream=self.stream, adapter=self.adapter)


@dataclass(frozen=True)
class BatchOptions:
    """The private batch: given, or drawn."""

    data: Annotated[
        str | None, Option("--data", help="Texts: reviews, grammar, notes, passages, cola, ... or a TSV file.")
    ] = None
    batch_size: Annotated[
        int | None, Option("--batch-size", min=1, help=f"Texts drawn from --data, {BATCH_SIZE} by default.")
    ] = None
    text: Annotated[list[str] | None, Option("--text", help="A text of the batch; repeat for more.")] = None

    def draw(self, seed: int, labels: list[int] | None = None) -> tuple[list[str], list[int] | None]:
        """The texts and their labels.

        Args:
            seed: Seed of the draw.
            labels: Classes of given texts.

        Raises:
            DagerError: Options contradict each other, or the texts cannot be read.
        """
        if bool(self.data) == bool(self.text):
            raise DagerError("give the texts either with --data NAME or FILE, or with --text (repeat it for more)")
        if self.text and self.batch_size is not None:
            raise DagerError("--batch-size draws from --data; with --text the batch is what you give")
        if self.text:
            _check_unicode(self.text)
            return self.text, labels
        if labels:
            raise DagerError("--label belongs to --text; the texts of --data have labels of their own")
        return drawn(str(self.data), self.batch_size or BATCH_SIZE, seed)


@dataclass(frozen=True)
class SeriesOptions:
    """Batches of every source and size, drawn with seeds that are counted up."""

    data: Annotated[list[str], Option("--data", help="Texts by name, or a TSV file; repeat it.")]
    batch_size: Annotated[list[int], Option("--batch-size", min=1, help="Number of texts; repeat it.")]
    batches: Annotated[int, Option("--batches", min=1, help="Batches of each kind, seeds counted up.")] = 5

    def draw(self, seed: int) -> list[Batch]:
        """The batches.

        Args:
            seed: Seed of the first batch of each kind.

        Raises:
            DagerError: Texts cannot be read, or are too few.
        """
        from dager_tutorial.evaluation.accuracy import Batch

        kinds = [(name, size) for name in self.data for size in self.batch_size]
        seeds = range(seed, seed + self.batches)
        return [Batch(Path(name).stem, draw, *drawn(name, size, draw)) for name, size in kinds for draw in seeds]


@dataclass(frozen=True)
class TruthOptions:
    """What decides which tokens the client's network saw of a text."""

    task: Task = "classification"
    max_length: MaxLength = None

    def config(self, seed: int) -> ClientConfig:
        """The client, as far as its truth is concerned.

        Args:
            seed: Seed of the masks.
        """
        from dager_tutorial.client.config import ClientConfig

        return ClientConfig(task=self.task, max_length=self.max_length, seed=seed)


@dataclass(frozen=True)
class ClientOptions:
    """How the client trains, and what it sends."""

    task: Task = "classification"
    loss: Annotated[Literal["cross_entropy", "frobenius"], Option(help="The client's loss.")] = "cross_entropy"
    dtype: Dtype = "float32"
    share: Share = "all"
    padding_side: Annotated[Literal["right", "left"], Option("--padding-side", help="Where the client pads.")] = "right"
    max_length: MaxLength = None
    head_std: Annotated[float, Option("--head-std", min=0.0, help="Deviation of a fresh head's class map.")] = 1e-3

    def config(self, seed: int) -> ClientConfig:
        """The client.

        Args:
            seed: Seed of its head and its masks.
        """
        from dager_tutorial.client.config import ClientConfig

        names = tuple(name.strip() for name in self.share.split(","))
        share = self.share if self.share in ("all", "attention") else names
        return ClientConfig(**vars(self) | {"share": share, "seed": seed})


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes, besides the terminal."""

    json: Annotated[Path | None, Option("--json", callback=output.writable, help="Write the result as JSON.")] = None

    def finish(self, record: dict[str, Any], *shown: RenderableType) -> None:
        """Write the record where --json says, then print what people read.

        Args:
            record: The result as JSON types.
            shown: The same for people.
        """
        if self.json is not None:
            output.write_json(self.json, record)
        output.show(*shown)


def _check_unicode(texts: list[str]) -> None:
    """Raise where the terminal handed over bytes that are no text: no tokenizer takes what Python makes of them."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DagerError(f"--text {quote(text, 40)} is not valid UTF-8: write it anew") from None


def drawn(data: str, size: int, seed: int) -> tuple[list[str], list[int]]:
    """Draw a batch.

    Args:
        data: Texts by name, or a TSV file.
        size: Number of texts.
        seed: Seed of the draw.

    Returns:
        The texts and their labels.

    Raises:
        DagerError: The texts cannot be read, or are too few.
    """
    from dager_tutorial.data import load_texts, sample_batch

    return sample_batch(load_texts(data), size, seed)
