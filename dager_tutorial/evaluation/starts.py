"""How many tokens may begin a text, by the textbook's two tests: the paper's Figure 2 (chapter `05_token_filter`)."""

from __future__ import annotations

import torch

from dager_tutorial.errors import DagerError
from dager_tutorial.models import adapter_for
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.textbook.block_inputs import TokenIds, first_block_inputs
from dager_tutorial.textbook.decoder import prefix_distances
from dager_tutorial.textbook.spans import span_distance, textbook_spans
from dager_tutorial.update import Update


@torch.no_grad()
def starting_tokens(
    model: LanguageModel, update: Update, *, threshold_0: float = 1e-5, threshold_1: float = 1e-3
) -> tuple[int, list[TokenIds]]:
    """Test every token of the vocabulary at the first position.

    Args:
        model: A causal model.
        update: What the client sent.
        threshold_0: Relative distance from the span of block 0 below which a token passes the first test.
        threshold_1: The same of block 1 for the second.

    Returns:
        How many pass the first test, and those that pass both, as beginnings of one token.

    Raises:
        DagerError: The model is an encoder or has one block only.
    """
    adapter = adapter_for(model.network)
    if not isinstance(adapter, DecoderAdapter):
        raise DagerError(f"model {model.name!r} is an encoder: starting tokens are those of causal models")
    first, second = textbook_spans(model, adapter, update).bases
    vocabulary = torch.arange(len(adapter.first_input.tokens), device=first.device)
    distances = span_distance(first_block_inputs(adapter, vocabulary, 0), first)
    passing = [(token,) for token in vocabulary[distances < threshold_0].tolist()]
    return len(passing), [
        prefix for prefix, distance in prefix_distances(adapter, second, passing).items() if distance < threshold_1
    ]
