"""Names that a sweep does not know are refused, with advice (chapter `15_reproducing_the_paper`)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from dager_tutorial.errors import DagerError


def advice(name: str, known: Collection[str]) -> str:
    """What to say of a name that there is not.

    Args:
        name: What was asked for.
        known: What there is.

    Example:
        >>> advice("sead", ["seeds", "models"])
        'did you mean seeds?'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def check_names(group: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse options that there are not.

    Args:
        group: Their group, for the message.
        names: What was asked for.
        known: What there is.

    Raises:
        DagerError: There is no such option.
    """
    for name in names:
        if name not in known:
            raise DagerError(f"{group}.{name}: no such option, {advice(name, sorted(known))}")
