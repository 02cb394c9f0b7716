"""How likely a text is before any gradient is seen: LAMP's second judge.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from dager_tutorial.models.heads import Head, choose_pad, with_head
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.training import filled_and_masked

Prior = Callable[[Sequence[str]], Float[Tensor, " texts"]]
"""For each text the mean negative logarithm of its tokens' probabilities: small for a text that people write."""

TEXTS_AT_ONCE = 32
"""Texts that go through a language model at once."""


class LanguagePrior:
    """The prior of a causal language model. Its tokenizer may be another one than that of the attacked model.

    Args:
        model: A causal model whose embedding is its output map, too.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.network = model, with_head(model.network, model.tokenizer, Head("next_token"))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " texts"]:
        """Mean negative log-likelihood of each text's tokens, in nats.

        Args:
            texts: At least one.
        """
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        return torch.cat([self._of(part) for part in parts])

    def _of(self, texts: Sequence[str]) -> Tensor:
        """The same for texts that go through at once."""
        rows = [self._tokens(text) for text in texts]
        ids, mask = filled_and_masked(
            rows, choose_pad(self.network, self.model.tokenizer, rows), device=self.model.device
        )
        logits = self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        each = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        return each.sum(-1) / mask[:, 1:].sum(-1)

    def _tokens(self, text: str) -> list[int]:
        """A text's tokens behind one that begins every text, so that the first one is judged, too."""
        tokenizer = self.model.tokenizer
        begin = next(each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if each is not None)
        return [begin, *(tokenizer(text, add_special_tokens=False)["input_ids"] or [begin])]


class BigramPrior:
    """The prior of pairs of words, counted in texts that the attacker has: small, and enough to tell an order.

    Args:
        texts: The attacker's own texts.

    Example:
        >>> prior = BigramPrior(["a good film", "a good book"])
        >>> likely, unlikely = prior(["a good film", "film good a"])
        >>> bool(likely < unlikely)
        True
    """

    def __init__(self, texts: Iterable[str]) -> None:
        rows = [_words(text) for text in texts]
        self.pairs = Counter(pair for row in rows for pair in pairwise(row))
        self.begun = Counter(first for first, _ in self.pairs.elements())
        self.known = len(set(self.begun)) + 1

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " texts"]:
        """Mean negative log-likelihood of each text's words, one added to every count.

        Args:
            texts: At least one.
        """
        return torch.tensor([self._of(list(pairwise(_words(text)))) for text in texts])

    def _of(self, pairs: Sequence[tuple[str, str]]) -> float:
        """The same of one text's pairs."""
        chances = ((self.pairs[pair] + 1) / (self.begun[pair[0]] + self.known) for pair in pairs)
        return -sum(map(math.log, chances)) / len(pairs)


def _words(text: str) -> list[str]:
    """A text's words between two marks for its ends."""
    return ["<", *text.lower().split(), ">"]
