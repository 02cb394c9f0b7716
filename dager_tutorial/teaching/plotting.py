"""What the book's figures share: one style, small matrices with their numbers, texts as a tokenizer sees them."""

from __future__ import annotations

import ast
import html
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from torch import Tensor
from transformers import PreTrainedTokenizerBase

COLOURS = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#8A8A8A",
}
"""The palette of Okabe and Ito, which people of every colour vision tell apart."""


@dataclass(frozen=True)
class Mark:
    """How a token looks by what it turned out to be: told apart by sign and line, not by colour alone.

    Attributes:
        background: On which black text can be read.
        line: The line below the token, as CSS writes it.
        sign: Before the token.
    """

    background: str
    line: str
    sign: str = ""


MARKS = {
    "": Mark("#f1f1f1", "2px solid transparent"),
    "true": Mark("#bfe3d6", "2px solid #00664a", "✓"),
    "false": Mark("#f5cdb2", "2px dashed #9a3400", "✗"),
    "unknown": Mark("#d9d9d9", "2px dotted #555", "?"),
    "special": Mark("#cfe3f2", "2px double #4a6f8a"),
}
"""By mark: a tick and a full line for true tokens, a cross and a broken one for false tokens."""


def use_style() -> None:
    """Give every following figure the book's style."""
    with resources.as_file(resources.files("dager_tutorial.teaching") / "book.mplstyle") as style:
        plt.style.use(str(style))


def matrix(ax: Axes, values: Tensor, title: str, *, digits: int = 1) -> None:
    """Draw a small matrix as coloured squares with the numbers in them.

    Args:
        ax: Where to draw.
        values: rows x columns, any real type.
        title: Above the matrix; its shape is added.
        digits: Decimal places of the numbers.
    """
    numbers = values.detach().double().cpu().numpy()
    rows, columns = numbers.shape
    limit = max(float(abs(numbers).max()), 1e-12)
    ax.imshow(numbers, cmap="PuOr", norm=TwoSlopeNorm(0.0, -1.8 * limit, 1.8 * limit))  # pale enough for black numbers
    for row in range(rows):
        for column in range(columns):
            shown = f"{numbers[row, column] + 0.0:.{digits}f}"
            ax.text(column, row, shown, ha="center", va="center", fontsize=10)
    ax.set(xticks=[], yticks=[], title=f"{title}\n{rows} x {columns}")
    ax.grid(False)
    ax.spines[:].set_visible(False)


@dataclass(frozen=True)
class TokenStrip:
    """Tokens in a row, each in its own box: what a tokenizer makes of a text. Notebooks show it as boxes.

    Attributes:
        tokens: The tokens' texts, with blanks made visible.
        marks: For each token a key of `MARKS`.
    """

    tokens: tuple[str, ...]
    marks: tuple[str, ...]

    def __repr__(self) -> str:
        """The tokens between bars, for terminals."""
        return "|".join(self.tokens)

    def _repr_html_(self) -> str:
        marked = list(zip(self.tokens, self.marks, strict=True))
        boxes = "".join(_box(token, mark) for token, mark in marked)
        said = ", ".join(f"{token} ({mark})" if mark else token for token, mark in marked)
        return f'<div role="img" aria-label="tokens: {html.escape(said)}" style="line-height:2.3">{boxes}</div>'


def token_strip(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], marks: Mapping[int, str] | Sequence[str] | None = None
) -> TokenStrip:
    """Show tokens as the tokenizer sees them; a blank inside a token becomes a visible dot.

    Args:
        tokenizer: The model's tokenizer.
        token_ids: The tokens.
        marks: For each place (a sequence), or by token id (a mapping), one of "", "true", "false", "unknown" and
            "special". Special tokens of the tokenizer are marked so unless something else is said.

    Returns:
        An object that a notebook shows as boxes, true and false ones with a tick and a cross, and a terminal as text.
    """
    special = set(tokenizer.all_special_ids)
    if isinstance(marks, Mapping):
        named = [marks.get(token, "") for token in token_ids]
    else:
        named = list(marks or [""] * len(token_ids))
    named = [mark or ("special" if token in special else "") for mark, token in zip(named, token_ids, strict=True)]
    return TokenStrip(tuple(visible(tokenizer.decode([token])) for token in token_ids), tuple(named))


def visible(text: str) -> str:
    r"""Make blanks and line ends visible.

    >>> visible(" the" + chr(10))
    '·the↵'
    """
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def _box(token: str, mark: str) -> str:
    look = MARKS[mark]
    style = f"background:{look.background};color:#111;border:0;border-bottom:{look.line};border-radius:3px 3px 0 0;"
    sign = f'<span style="user-select:none;font-size:0.8em">{look.sign}</span>' if look.sign else ""
    style += "padding:1px 4px;margin:1px;white-space:pre"
    return f'<code style="{style}">{sign}{html.escape(token)}</code> '


def show_source(function: Callable[..., Any]) -> Markdown:
    """The source of a function without its docstring: how the package does what a chapter has just done by hand.

    Args:
        function: A function or method of the package.

    Returns:
        Code that a notebook shows highlighted.
    """
    source = textwrap.dedent(inspect.getsource(function))
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef), f"{function!r} is no function"
    if ast.get_docstring(definition) is not None:
        docstring = definition.body[0]
        lines = source.splitlines()
        source = "\n".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :])
    return Markdown(f"```python\n{source.strip()}\n```")
