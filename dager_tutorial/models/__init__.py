"""What both sides know of a model: taps, adapters (one a family), attention written once."""

from __future__ import annotations

from transformers import PreTrainedModel

from dager_tutorial.errors import ModelError
from dager_tutorial.models.adapter import Adapter
from dager_tutorial.models.bert import BertAdapter
from dager_tutorial.models.distilbert import DistilBertAdapter
from dager_tutorial.models.gpt2 import GPT2Adapter
from dager_tutorial.models.llama import LlamaAdapter
from dager_tutorial.models.roberta import RobertaAdapter

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


__all__ = ["FAMILIES", "adapter_for"]
