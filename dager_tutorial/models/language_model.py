"""What client and server agree on: a headless transformer and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LanguageModel:
    """A headless transformer with its tokenizer: all that server and client agree on.

    Attributes:
        name: The name it was loaded by.
        network: The backbone, in eval mode, float32, no parameter requiring a gradient. The numbers of its deeper
            blocks may be out of memory while they do not run (`streaming`).
        tokenizer: Its tokenizer.
    """

    name: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """The device that the backbone lives on."""
        return next(self.network.parameters()).device

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.network.config.hidden_size)

    def text_of(self, ids: Iterable[int]) -> str:
        """The text of some tokens, without what frames it; unknown words and masks are shown.

        Args:
            ids: Token ids.
        """
        frame = frame_ids(self.tokenizer)
        return str(self.tokenizer.decode([token for token in ids if token not in frame]))


def frame_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that frame or pad a text. An unknown word or a mask is not among them: it is part of its text.

    Args:
        tokenizer: The model's tokenizer.
    """
    names = ("bos", "eos", "cls", "sep", "pad")
    return frozenset(getattr(tokenizer, f"{name}_token_id") for name in names) - {None}
