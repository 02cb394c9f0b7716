"""What was trained, where nobody says: the task shows in what else the update holds (chapter `09_completion`)."""

from __future__ import annotations

from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.heads import Head
from dager_tutorial.update import Update


def plausible_heads(update: Update, adapter: Adapter) -> list[Head]:
    """Heads that may have been trained, the likeliest first, as this package's clients draw them.

    Args:
        update: What the client sent.
        adapter: The architecture.

    Returns:
        One head a task.
    """
    outside, vocabulary = update.for_head(adapter.network), adapter.config.vocab_size
    tokens = Head("next_token" if adapter.causal else "masked")
    if any(vocabulary in tensor.shape for tensor in outside.values()):
        return [tokens]
    return [Head()] if outside else [Head(), tokens]
