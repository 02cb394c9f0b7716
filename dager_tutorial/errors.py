"""Errors that a user can mend: one line that names the culprit and says what to do, and shows nothing unescaped."""

from __future__ import annotations


class DagerError(ValueError):
    """A mistake in what the user gave: a file, a tensor, a name or an option."""


class ModelError(DagerError):
    """A model cannot be found, fetched or read."""


class UpdateError(DagerError):
    """An update file is malformed or does not belong to the model."""


def quote(value: object, limit: int = 120) -> str:
    r"""Show a stranger's text inside a one-line message: quoted, control characters escaped, cut to length.

    Args:
        value: Anything; shown as ``str(value)``.
        limit: Longest text, in characters, shown whole.

    Returns:
        The text in quotes.

    Example:
        >>> print(quote("two" + chr(10) + "lines"))
        'two\nlines'
    """
    text = str(value)
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")


def printable(text: str) -> str:
    """Make a stranger's text safe to print: line breaks become a sign, control codes a replacement character.

    Args:
        text: Any text.

    Example:
        >>> printable("two" + chr(10) + "lines and a bell" + chr(7)) == "two↵lines and a bell�"
        True
    """
    signs = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", " ")
    return "".join(sign if sign.isprintable() else "�" for sign in signs)
