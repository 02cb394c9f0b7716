"""The command as it was typed, for a report, without what is private in it."""

from __future__ import annotations

import shlex

import typer

PRIVATE = ("text", "label")  # options whose values are the batch itself


def typed(context: typer.Context, *, shown: bool) -> str:
    """The command that was given.

    Args:
        context: What typer made of it.
        shown: Whether the values that are the batch itself may stand in it.
    """
    words = context.command_path.split()
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        values = value if isinstance(value, list | tuple) else [value]
        if parameter.name in PRIVATE and not shown:
            values = ["▮▮▮▮" for _ in values]
        for each in values:
            words += _word(parameter, each)
    return " ".join(words)


def _word(parameter: object, value: object) -> list[str]:
    """An option with its value, as one types it."""
    names = [name for name in getattr(parameter, "opts", []) if name.startswith("-")]
    if not names:
        return [shlex.quote(str(value))]
    if isinstance(value, bool):
        return [names[0] if value else [*getattr(parameter, "secondary_opts", []), *names][0]]
    return [max(names, key=len), shlex.quote(str(value))]
