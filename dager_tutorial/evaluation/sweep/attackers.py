"""The attacks that a sweep may run, by name: what options each takes, and the call that runs it.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.starts import starting_tokens
from dager_tutorial.evaluation.sweep.attacker import Attacker, Found, Received
from dager_tutorial.evaluation.sweep.earlier import EARLIER
from dager_tutorial.evaluation.sweep.known import check_names
from dager_tutorial.models import adapter_for
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.status import Status
from dager_tutorial.textbook.choices import EncoderSearchOptions
from dager_tutorial.textbook.decoder import textbook_attack
from dager_tutorial.textbook.encoder import textbook_encoder_attack


def _read_limits(options: Mapping[str, Any]) -> AttackConfig:
    named = dict(options)
    check_names("attack", named, {field.name for field in fields(AttackConfig)} - {"stop"})
    if "without" in named:
        named["without"] = frozenset(named["without"])
    try:
        return AttackConfig(**named)
    except DagerError as error:
        raise DagerError(f"attack.{error}") from error


def _ours(received: Received, limits: AttackConfig) -> Found:
    return Found(attack(received.model, received.update, head=received.head, config=limits))


SEARCH = {field.name for field in fields(EncoderSearchOptions)}
"""Options that the textbook's search of encoders has, and that of decoders has not."""


def _read_textbook(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        name for name, each in inspect.signature(textbook_attack).parameters.items() if each.kind is each.KEYWORD_ONLY
    }
    check_names("attack", options, (known | SEARCH) - {"progress"})
    EncoderSearchOptions(**{name: value for name, value in options.items() if name in SEARCH})
    return dict(options)


def _textbook(received: Received, options: Mapping[str, Any]) -> Found:
    spans = {name: value for name, value in options.items() if name not in SEARCH}
    if adapter_for(received.model.network).causal:
        return Found(textbook_attack(received.model, received.update, **spans))
    search = EncoderSearchOptions(**{name: value for name, value in options.items() if name in SEARCH})
    return Found(textbook_encoder_attack(received.model, received.update, options=search, **spans))


def _read_thresholds(options: Mapping[str, Any]) -> dict[str, Any]:
    check_names("attack", options, {"threshold_0", "threshold_1"})
    return dict(options)


def _starts(received: Received, thresholds: Mapping[str, float]) -> Found:
    first, both = starting_tokens(received.model, received.update, **thresholds)
    texts = tuple(map(received.model.text_of, both))
    found = Reconstruction(tuple(both), texts, (1.0,) * len(both), Status.PARTIAL, model=received.model.name)
    return Found(found, {"starts.first": first, "starts.both": len(both)})


ATTACKERS = {
    "dager": Attacker(_read_limits, _ours),
    "textbook": Attacker(_read_textbook, _textbook),
    "starts": Attacker(_read_thresholds, _starts),
    **EARLIER,
}
"""`dager` is this project's attack, `textbook` the paper's algorithm as it writes it, `starts` its first step alone;
`dlg`, `tag` and `lamp` came before (`earlier`)."""
