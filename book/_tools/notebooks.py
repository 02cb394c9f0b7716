"""Make and refresh the notebooks of the book: executed, and the same bytes whenever they are made again.

    python book/_tools/notebooks.py refresh [NOTEBOOK ...]   execute again, all notebooks if none is named
    python book/_tools/notebooks.py build DRAFT ...          a draft (MyST .md or percent .py) becomes book/<name>.ipynb
    python book/_tools/notebooks.py draft NOTEBOOK           print the notebook as a MyST draft, without outputs
    python book/_tools/notebooks.py handouts                 write _build/handouts/{student,instructor}/<name>.ipynb

The notebooks are the source of the book. Drafts are a comfortable way to write them and are not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
HANDOUTS = ROOT / "_build" / "handouts"
TIMEOUT = 300  # seconds a cell
MOST_MEMORY = 1.5  # GB a notebook
PROBE = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
# Threads change the rounding of sums, and a kernel on each core would fight for all of them.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
LIVE_ONLY = "application/vnd.jupyter.widget-view+json"  # names a model of a kernel that is gone
COLAB = "colab"
COLAB_CELL = """\
# On Colab: install the package. Anywhere else this cell does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "dager-tutorial[{extras}] @ git+{url}"\
"""
EXTRAS = {"flwr": "flower", "opacus": "opacus"}  # optional packages that are imported, and their extras
ANSWER = re.compile(r' *<details class="answer">.*?</details> *\n?', re.DOTALL)
SOLUTION = {
    "jupyter": {"source_hidden": True},
    "mystnb": {"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"},
}


def repository_url() -> str:
    """Where the project lives: the one place is `_config.yml`."""
    return yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]


def notebook_paths() -> list[Path]:
    """Every notebook of the book."""
    return sorted(BOOK.glob("*.ipynb"))


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Put a notebook into the one form that is committed; what it says stays as it is.

    Cell ids follow from the cells' sources, metadata hold nothing of the machine, and the cell that installs the
    package on Colab carries the repository's address.

    Args:
        notebook: A notebook in format 4; it is changed in place.

    Returns:
        The same notebook.
    """
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = NotebookNode(METADATA)
    _place_colab_cell(notebook)
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.source = cell.source.strip("\n")
        cell.metadata = _cell_metadata(cell)
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.pop("attachments", None)
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            if "data" in output:
                output.data.pop(LIVE_ONLY, None)
                output.metadata = NotebookNode()
    return notebook


def _cell_metadata(cell: NotebookNode) -> NotebookNode:
    """The metadata that mean something to the book, in a fixed order."""
    kept: dict[str, Any] = {key: cell.metadata[key] for key in ("mystnb", "notes", "tags") if key in cell.metadata}
    if "solution" in kept.get("tags", ()):
        kept |= SOLUTION
        kept["tags"] = sorted({*kept["tags"], "hide-cell"})
    return nbformat.from_dict(dict(sorted(kept.items())))


def _place_colab_cell(notebook: NotebookNode) -> None:
    """The second cell, behind the title; made anew so that it carries the address of today."""
    source = COLAB_CELL.format(url=repository_url(), extras=",".join(["notebooks", *_extras(notebook)]))
    for cell in notebook.cells:
        if COLAB in cell.metadata.get("tags", ()):
            cell.source = source
            return
    if any(cell.cell_type == "code" for cell in notebook.cells):
        made = nbformat.v4.new_code_cell(source, metadata={"tags": [COLAB, "remove-cell"]})
        notebook.cells.insert(1, made)


def _extras(notebook: NotebookNode) -> list[str]:
    """The extras of the package that a notebook's imports need beside those of all chapters."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return [extra for name, extra in EXTRAS.items() if re.search(rf"^\s*from {name}\b", code, re.MULTILINE)]


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run every cell in a fresh kernel of this very environment, in the book's folder.

    Args:
        notebook: The notebook; its outputs are replaced.

    Returns:
        The same notebook, normalised.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails that is not tagged `raises-exception`.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    client = NotebookClient(
        normalise(notebook),
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(BOOK)}},
    )
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    start = time.perf_counter()
    client.execute()
    memory = int(notebook.cells.pop().outputs[0].text) / 1e6
    print(f"{time.perf_counter() - start:.0f} s, {memory:.2f} GB at the peak", end="; ")
    if memory > MOST_MEMORY:
        raise SystemExit(f"more than {MOST_MEMORY} GB, and Binder has only 2: use fewer blocks or smaller batches")
    return normalise(notebook)


def refresh(path: Path) -> None:
    """Execute a notebook and write it back where anything changed."""
    before = path.read_text("utf-8")
    text = dumped(execute(nbformat.reads(before, as_version=4)))
    path.write_text(text, "utf-8")
    print(f"{path.relative_to(ROOT)}: {'as it was' if text == before else 'changed'}")


def build(draft: Path) -> None:
    """Write a draft as a notebook of the book, its code formatted, and execute it."""
    kind = "md:myst" if draft.suffix == ".md" else "py:percent"
    target = BOOK / f"{draft.stem}.ipynb"
    target.write_text(dumped(normalise(jupytext.reads(draft.read_text("utf-8"), fmt=kind))), "utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(target)], check=True)
    refresh(target)


def dumped(notebook: NotebookNode) -> str:
    """A notebook as the text of its file."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def draft_of(path: Path) -> str:
    """A notebook as a MyST draft: what to edit where much is to be changed."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if COLAB not in cell.metadata.get("tags", ())]
    return jupytext.writes(notebook, fmt="md:myst")


def handout_of(path: Path, reader: str) -> str:
    """A chapter for a class, as the text of a notebook.

    Args:
        path: The chapter.
        reader: "student" gets no solutions, no answers, no outputs and no notes of the speaker; "instructor" gets all,
            unfolded.

    Returns:
        A notebook's JSON.
    """
    notebook = nbformat.read(path, as_version=4)
    change = {"student": _for_student, "instructor": _for_instructor}[reader]
    notebook.cells = [change(cell) for cell in notebook.cells if reader != "student" or not _tells(cell)]
    return dumped(notebook)


def _tells(cell: NotebookNode) -> bool:
    """Whether a cell is there for its answer alone."""
    return "solution" in cell.metadata.get("tags", ()) or (
        cell.cell_type == "markdown" and not ANSWER.sub("", cell.source).strip()
    )


def _for_student(cell: NotebookNode) -> NotebookNode:
    cell.metadata.pop("notes", None)
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
    else:
        cell.source = re.sub(r"\n{3,}", "\n\n", ANSWER.sub("", cell.source)).strip()
    return cell


def _for_instructor(cell: NotebookNode) -> NotebookNode:
    cell.metadata.pop("jupyter", None)  # folds
    if cell.cell_type == "markdown":
        cell.source = cell.source.replace('<details class="answer">', '<details class="answer" open>')
    return cell


def handouts() -> None:
    """Write both handouts of every chapter."""
    shutil.rmtree(HANDOUTS, ignore_errors=True)
    chapters = [path for path in notebook_paths() if path.stem[:2].isdigit()]
    for reader in ("student", "instructor"):
        (HANDOUTS / reader).mkdir(parents=True)
        for path in chapters:
            (HANDOUTS / reader / path.name).write_text(handout_of(path, reader), "utf-8")
    print(f"{HANDOUTS.relative_to(ROOT)}/student and instructor: {len(chapters)} chapters each")


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("refresh", "build", "draft", "handouts"))
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "draft":
        for path in arguments.files:
            sys.stdout.write(draft_of(path))
    elif arguments.command == "handouts":
        handouts()
    elif arguments.command == "build":
        for path in arguments.files:
            build(path)
    else:
        for path in [path.resolve() for path in arguments.files] or notebook_paths():
            refresh(path)


if __name__ == "__main__":
    main()
