"""Labelled texts to attack: the project's own, public corpora by name, or a TSV file.

The project's texts were written for it and come with the package. Public corpora are fetched through
the optional package `datasets`; a TSV file (columns `label` and `text`) works without any network.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from dager_tutorial.errors import DagerError, quote

OWN = ("reviews", "grammar", "notes", "passages")
PUBLIC = {  # name: (Hugging Face data set, its configuration, its column of texts)
    "cola": ("nyu-mll/glue", "cola", "sentence"),
    "sst2": ("nyu-mll/glue", "sst2", "sentence"),
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", None, "text"),
}
HEADER = "label\ttext"
LABEL = re.compile("[0-9]{1,4}")  # bounded: a label is a class, and a head of a billion classes fits nowhere


class Example(NamedTuple):
    """One labelled text.

    Attributes:
        label: The class, 0 or larger.
        text: The text, never blank.
    """

    label: int
    text: str


def load_texts(name_or_path: str | Path, split: str | None = None) -> list[Example]:
    """Load labelled texts by name or from a TSV file.

    A TSV file is UTF-8 text. Its first line is `label<TAB>text`, every further line a whole number from
    0 to 9999, a tab and a text. Nothing is quoted, so quotation marks stand for themselves.

    Args:
        name_or_path: `reviews`, `grammar`, `notes` or `passages` (the project's own), `cola`, `sst2` or
            `rotten_tomatoes` (through `datasets` and a network), or the path of a TSV file. A name wins
            over a file that is called the same: write `./notes` for the file.
        split: Split of a public corpus, `train` if not given. Other texts have no splits.

    Returns:
        The examples in the order of their source, at least one.

    Raises:
        DagerError: The name is unknown, the corpus cannot be fetched, or the file is malformed.

    >>> len(load_texts("notes")) >= 60
    True
    """
    name = str(name_or_path)
    if name in PUBLIC:
        return _fetch(name, split or "train")
    if split is not None:
        raise DagerError(f"{quote(name)}: split {quote(split)} is only for {', '.join(PUBLIC)}; leave it out")
    if name in OWN:
        texts = resources.files("dager_tutorial.texts").joinpath(f"{name}.tsv")
        return _parse(texts.read_bytes(), f"{name}.tsv")
    return _parse(_read(name), repr(name))


def sample_batch(examples: Sequence[Example], batch_size: int, seed: int) -> tuple[list[str], list[int]]:
    """Draw a batch without replacement.

    Args:
        examples: What to draw from.
        batch_size: Number of texts, 1 to `len(examples)`.
        seed: The same seed draws the same batch.

    Returns:
        The texts and their labels, `batch_size` of each.

    Raises:
        DagerError: The batch size is below 1 or larger than the number of examples.

    >>> examples = [Example(0, "a cat"), Example(1, "a dog"), Example(0, "a cow")]
    >>> texts, labels = sample_batch(examples, 3, seed=0)
    >>> sorted(texts), sum(labels)
    (['a cat', 'a cow', 'a dog'], 1)
    """
    if not 1 <= batch_size <= len(examples):
        raise DagerError(f"batch size {batch_size}: choose between 1 and the {len(examples)} texts that there are")
    batch = random.Random(seed).sample(examples, batch_size)
    return [example.text for example in batch], [example.label for example in batch]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        names = ", ".join((*OWN, *PUBLIC))
        raise DagerError(f"{path!r}: no such file, and no texts are called so; names: {names}") from None
    except IsADirectoryError:
        raise DagerError(f"{path!r}: is a directory; give a TSV file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a path that holds a null character
        raise DagerError(f"{path!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _parse(content: bytes, source: str) -> list[Example]:
    """Read the rows of a TSV file; `source` names it in errors."""
    header, *rows = _lines(content, source)
    if header != HEADER:
        raise DagerError(f"{source}, line 1: the header must be label<TAB>text, not {quote(header, 40)}")
    if not rows:
        raise DagerError(f"{source}: no texts after the header; add a line label<TAB>text for each")
    return [_row(row, f"{source}, line {number}") for number, row in enumerate(rows, start=2)]


def _lines(content: bytes, source: str) -> Iterator[str]:
    """Decode line by line, at line feeds only: a text may hold any other line separator of Unicode."""
    if not content.strip():
        raise DagerError(f"{source}: the file is empty; its first line must be label<TAB>text")
    lines = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError:
            raise DagerError(f"{source}, line {number}: not UTF-8; save the file as UTF-8") from None


def _row(row: str, place: str) -> Example:
    fields = row.split("\t")
    if len(fields) != 2:
        raise DagerError(f"{place}: {len(fields)} column(s) instead of two, label<TAB>text: {quote(row, 40)}")
    label, text = fields
    if not LABEL.fullmatch(label):
        raise DagerError(f"{place}: the label must be a whole number from 0 to 9999, not {quote(label, 40)}")
    if not text.strip():
        raise DagerError(f"{place}: the text is blank; leave the line out")
    return Example(int(label), text)


def _fetch(name: str, split: str) -> list[Example]:
    """Load a split of a public corpus through `datasets`."""
    instead = "or give a TSV file with the columns label and text"
    try:
        from datasets import load_dataset
    except ImportError:
        raise DagerError(f"{name}: needs the package datasets (pip install datasets), {instead}") from None
    dataset, configuration, column = PUBLIC[name]
    try:
        rows = load_dataset(dataset, configuration, split=split)
    except Exception as error:  # anything that a download can die of, in the types of several HTTP libraries
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DagerError(f"{name}: split {split!r} cannot be fetched ({reason}); check both, {instead}") from error
    return _labelled(((row["label"], row[column]) for row in rows), f"{name}, split {split!r}")


def _labelled(rows: Iterable[tuple[int, str]], source: str) -> list[Example]:
    """Keep the rows that have a text; a split whose labels are withheld says so."""
    examples = [Example(int(label), text) for label, text in rows if text.strip()]
    if any(example.label < 0 for example in examples):
        raise DagerError(f"{source}: its labels are withheld; choose train or validation")
    if not examples:
        raise DagerError(f"{source}: there are no texts in it; choose another split")
    return examples
