"""A prompt that every text is known to begin with: whether it is there, and where the search begins then.

Chapter `11_limits`.

What is known makes no room in a span: to take the prompt's inputs out takes as many dimensions away as directions, so
that as many stay free as before. What it spares is the search for the prompt itself, and every false beginning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from dager_tutorial.models.tap import Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.evidence import Evidence
from dager_tutorial.server.token_filter import Candidates


def passing(candidates: Candidates, prompt: Sequence[int]) -> int:
    """How many of a prompt's tokens, from the first on, are candidates where they would stand.

    Args:
        candidates: Tokens that may stand at each position.
        prompt: Token ids.
    """
    here = (token in candidates.at(place).tolist() for place, token in enumerate(prompt))
    return sum(1 for _ in itertools.takewhile(bool, here))


@torch.no_grad()
def explained(evidence: Evidence, taps: Sequence[Tap], prompt: Sequence[int]) -> int:
    """How many of a prompt's rows, from the first on, the update of a causal model holds.

    A row that is not there is followed by none that is, so that the likeliest number is where the log-odds of the rows
    before, summed, are largest. It falls short of the whole only by evidence that chance hardly ever gives.

    Args:
        evidence: The update's gradients.
        taps: Those that are asked, shared or not.
        prompt: Token ids, at least one.
    """
    device = evidence.adapter.first_input.tokens.device
    ids = torch.tensor([list(prompt)], device=device)
    inputs = evidence.adapter.tap_inputs(ids, torch.ones_like(ids), taps)
    odds = evidence.log_odds({tap: vectors[0].float() for tap, vectors in inputs.items()})
    if not odds:
        return len(prompt)
    total = torch.stack([each.cpu() for each in odds.values()]).sum(0).cumsum(0)
    most = max(0.0, total.max().item())
    if most - total[-1].item() <= -math.log(constants().miss_rate):
        return len(prompt)
    return int(total.argmax()) + 1 if most > 0 else 0
