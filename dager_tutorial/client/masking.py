"""What masked-language training does to a text before the network sees it (chapter `01_gradients_leak`)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import frame_ids

IGNORED = -100
"""The label that transformers' losses skip."""

# As BERT does it: how many tokens are targets, and what becomes of a target.
_TARGETS, _MASKED, _RANDOM = 0.15, 0.8, 0.1


def masked_inputs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Corrupt texts as masked-language training does: what the network sees, and what it is asked for.

    In every text 15 % of the tokens, at least one, are targets; those that frame it are not. A target becomes the
    mask token (80 %), a random token (10 %) or stays (10 %), as in BERT (Devlin et al., 2019). It depends on the seed
    and the text alone, not on the text's place in the batch; equal texts are corrupted one by one.

    Args:
        tokenizer: The model's tokenizer.
        ids: Token ids of the texts, as `batch.encode` gives them.
        seed: Seed of the choice.

    Returns:
        For each text the token ids that the network sees, and as many targets: the original id, or `IGNORED` where
        nothing is asked.

    Raises:
        DagerError: The tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise DagerError(
            "task 'masked' needs a mask token and the tokenizer has none: choose task 'classification', or a "
            "tokenizer with a mask token"
        )
    frame = frame_ids(tokenizer)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    seen: Counter[tuple[int, ...]] = Counter()
    inputs, targets = [], []
    for tokens in map(tuple, ids):
        chance = random.Random(f"{seed} {seen[tokens]} {tokens}")
        seen[tokens] += 1
        chosen = _targets([place for place, token in enumerate(tokens) if token not in frame], chance)
        corrupted = {place: _corrupted(tokens[place], tokenizer.mask_token_id, ordinary, chance) for place in chosen}
        inputs.append([corrupted.get(place, token) for place, token in enumerate(tokens)])
        targets.append([token if place in corrupted else IGNORED for place, token in enumerate(tokens)])
    return inputs, targets


def _targets(places: Sequence[int], chance: random.Random) -> list[int]:
    """Which of the places are asked for: at least one, where there is any."""
    return chance.sample(places, min(len(places), max(1, round(_TARGETS * len(places)))))


def _corrupted(token: int, mask: int, ordinary: Sequence[int], chance: random.Random) -> int:
    """What the network sees in place of a target."""
    draw = chance.random()
    if draw < _MASKED:
        return mask
    return chance.choice(ordinary) if draw < _MASKED + _RANDOM else token
