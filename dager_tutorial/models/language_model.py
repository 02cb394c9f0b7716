"""What client and server agree on: a headless transformer and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dager_tutorial.models.low_rank import LowRankMaps, maps_of, merged


@dataclass(frozen=True)
class LanguageModel:
    """A headless transformer with its tokenizer: all that server and client agree on.

    Attributes:
        name: The name it was loaded by.
        network: The backbone, in eval mode, float32, no parameter requiring a gradient. The numbers of its deeper
            blocks may be out of memory while they do not run (`streaming`).
        tokenizer: Its tokenizer.
        adapter: The low-rank adapter that the server broadcast and the client trains, by module; the network then has
            the merged weights. Empty where the network itself is trained.
    """

    name: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: LowRankMaps = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that the backbone lives on."""
        return next(self.network.parameters()).device

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.network.config.hidden_size)

    def adapted(self, maps: LowRankMaps | nn.Module) -> LanguageModel:
        """The same model with a low-rank adapter, its weights merged (chapter `13_adapters`).

        Args:
            maps: The adapted maps by module, or the model that peft made of this one.

        Raises:
            ModelError: It is no LoRA adapter of this model.

        Returns:
            A model that shares all other weights with this one.
        """
        given = maps_of(maps, self.network) if isinstance(maps, nn.Module) else maps
        return LanguageModel(self.name, merged(self.network, given), self.tokenizer, given)

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
