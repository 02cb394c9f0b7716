"""What libraries say while they read a model: kept back, or turned into one line that names the file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from dager_tutorial.errors import ModelError


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices and progress bars to itself, and restore the user's settings afterwards."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library says about a bad file into one line that names the file.

    Transformers raises nearly every exception there is for malformed files, hence the breadth.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot read {what}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
