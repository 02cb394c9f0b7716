"""The whole attack: an update and a model in, a reconstruction and a diagnosis out (chapter 6).

Nothing here has a threshold to set. Each stage is a file of its own: `subspace` reads spans off the gradients,
`token_filter` finds candidates, `decoder` grows prefixes of causal models and `sentences` tells where texts end,
`unmixing` and `encoder` find whole texts of bidirectional ones.
"""

from __future__ import annotations

import time

from dager_tutorial.server.decoder.run import DecoderRun
from dager_tutorial.server.encoder.run import EncoderRun
from dager_tutorial.server.evidence import evidence_of
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.budget import AttackConfig, Progress, Run
from dager_tutorial.update import Update

__all__ = ["AttackConfig", "attack"]


def attack(
    model: LanguageModel,
    update: Update,
    *,
    config: AttackConfig | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Recover the texts of a client's batch from its update.

    Args:
        model: The model both sides know.
        update: What the client sent, and all that is known of the batch.
        config: What the run may cost.
        progress: Called with the stage, what is done and the total or None.

    Returns:
        The recovered token sequences with a status; an uninformative update gives an empty one, never an exception.

    Raises:
        UpdateError: The update does not belong to the model.
        ModelError: The architecture has no adapter.

    See chapter 6, and Petrov et al., DAGER, NeurIPS 2024 for the attack this one builds on.
    """
    config = config or AttackConfig()
    begin = time.perf_counter()
    evidence = evidence_of(model, update)
    run: type[Run] = DecoderRun if isinstance(evidence.adapter, DecoderAdapter) else EncoderRun
    return run(model, evidence, config, progress, begin).reconstruction()
