"""Which entries of a vocabulary no text can have: those beyond its tokenizer, and some that it never finds.

Chapter `05_token_filter`.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def can_be_in_texts(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
    """Which tokens some text may have.

    A model's embedding is often padded to a round number of rows: what lies beyond the tokenizer is in no text. And a
    BERT tokenizer cuts texts at every punctuation mark before it looks words up, so that an entry such as `[unused12]`
    is never found, unless it was added as a token of its own.

    Args:
        tokenizer: The model's tokenizer.
        ids: int64 token ids, of the embedding's rows.

    Returns:
        True where it is not certain that no text has the token.
    """
    names = [tokenizer.convert_ids_to_tokens(token) for token in ids.tolist()]
    cut = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    whole = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}

    def possible(name: str | None) -> bool:
        if name is None or name in whole or cut is None or type(cut).__name__ != "BertPreTokenizer":
            return name is not None
        letters = name.removeprefix("##")
        return letters.isalnum() or len(cut.pre_tokenize_str(letters)) <= 1

    return torch.tensor([possible(name) for name in names], dtype=torch.bool, device=ids.device)


def beginning(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """The tokens with which every text begins that begins with a prompt, whatever follows.

    The prompt's last token may depend on what follows, as a word that goes on or a blank that joins the next word:
    then it is left out.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt.

    Returns:
        Token ids, with what the tokenizer puts before every text.
    """
    texts = [list(tokenizer(prompt + following)["input_ids"]) for following in ("a", " a", "1", ".", "\n")]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return tuple(column[0] for column in columns)
