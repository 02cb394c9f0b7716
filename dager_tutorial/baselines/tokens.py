"""From embeddings to tokens: what frames a text, and which token is nearest.

Chapter `02_attacks_that_optimise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import frame_ids
from dager_tutorial.models.vocabulary import can_be_in_texts

Ids = tuple[int, ...]


def framed(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int | None]:
    """A text of so many tokens of which only the frame is known: [CLS] and [SEP] of BERT, nothing of GPT-2.

    Args:
        tokenizer: The model's tokenizer.
        length: Number of tokens, special ones included.

    Returns:
        The id at each place, None where it is unknown.

    Raises:
        DagerError: The text is shorter than its frame.
    """
    special = frame_ids(tokenizer)
    ids: list[int] = tokenizer("a")["input_ids"]
    begin = list(takewhile(special.__contains__, ids))
    end = list(takewhile(special.__contains__, reversed(ids)))[::-1]
    unknown = length - len(begin) - len(end)
    if unknown < 1:
        raise DagerError(f"a length is {length}: a text has {len(begin) + len(end)} special tokens and a word at least")
    return [*begin, *[None] * unknown, *end]


class NearestTokens:
    """The token whose embedding points most nearly the way of a vector.

    Args:
        table: The token embeddings.
        tokenizer: The model's tokenizer; special tokens, and those that no text has, are left out.
    """

    def __init__(self, table: Float[Tensor, "vocabulary width"], tokenizer: PreTrainedTokenizerBase) -> None:
        ids = torch.arange(len(table), device=table.device)
        self.table, self.norms = table, table.norm(dim=-1)
        self.possible: Bool[Tensor, " vocabulary"] = can_be_in_texts(tokenizer, ids)
        self.possible[[token for token in frame_ids(tokenizer) if token < len(table)]] = False
        self.possible &= self.norms > 0

    @property
    def usual_norm(self) -> float:
        """The mean norm of the embeddings that texts may have."""
        return float(self.norms[self.possible].mean())

    def sized(self, vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Vectors at the mean norm of the embeddings.

        Args:
            vectors: None of them zero.
        """
        return vectors / vectors.norm(dim=-1, keepdim=True) * self.usual_norm

    def of(self, vectors: Float[Tensor, "rows width"]) -> Int[Tensor, " rows"]:
        """The nearest tokens (int64) by cosine.

        Args:
            vectors: Embeddings that need not be any token's.
        """
        cosines = vectors @ self.table.T / self.norms
        return cosines.masked_fill(~self.possible, -torch.inf).argmax(-1)

    def texts(
        self, vectors: Float[Tensor, "texts length width"], frames: Sequence[Sequence[int | None]]
    ) -> tuple[Ids, ...]:
        """The nearest tokens of whole texts, what frames them kept.

        Args:
            vectors: Embeddings, pads included.
            frames: What `framed` says of each text.
        """
        found = self.of(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2]).tolist()
        pairs = (zip(frame, row, strict=False) for frame, row in zip(frames, found, strict=True))
        return tuple(tuple(near if known is None else known for known, near in pair) for pair in pairs)
