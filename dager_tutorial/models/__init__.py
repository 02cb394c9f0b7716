"""Models: where weights come from (`zoo`) and what the attack needs to know of each architecture (adapters)."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..errors import ModelError
from .base import Adapter, LanguageModel
from .bert import BertAdapter
from .distilbert import DistilBertAdapter
from .gpt2 import GPT2Adapter
from .llama import LlamaAdapter
from .roberta import RobertaAdapter

FAMILIES: dict[str, type[Adapter]] = {
    "gpt2": GPT2Adapter,
    "llama": LlamaAdapter,
    "mistral": LlamaAdapter,
    "qwen2": LlamaAdapter,
    "smollm3": LlamaAdapter,
    "bert": BertAdapter,
    "distilbert": DistilBertAdapter,
    "roberta": RobertaAdapter,
    "xlm-roberta": RobertaAdapter,
    "camembert": RobertaAdapter,
}


def adapter_for(network: PreTrainedModel) -> Adapter:
    """Choose the adapter of a backbone by its `config.model_type`.

    Args:
        network: A headless transformers model.

    Raises:
        ModelError: No adapter knows the architecture.
    """
    family = FAMILIES.get(network.config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(f"architecture {network.config.model_type!r} has no adapter; known architectures: {known}")
    return family(network)


__all__ = ["FAMILIES", "Adapter", "LanguageModel", "adapter_for"]
