"""From a cell's options to the records that they are fields of, so that a new field of a record works here unasked.

Chapter `15_reproducing_the_paper`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dager_tutorial.client.adapters import LoraConfig
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defended import Protection
from dager_tutorial.client.defenses.clipping import Clipping
from dager_tutorial.client.defenses.noise import Noise
from dager_tutorial.client.defenses.pruning import PercentileFilter, Pruning
from dager_tutorial.client.defenses.rounding import Rounding
from dager_tutorial.client.federated import LocalTraining
from dager_tutorial.client.private import Privacy
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.sweep.attacker import Attacker
from dager_tutorial.evaluation.sweep.attackers import ATTACKERS
from dager_tutorial.evaluation.sweep.cells import AXES, OPTIONS, Cell, group_of
from dager_tutorial.evaluation.sweep.known import advice, check_names

MODEL = ("blocks", "seed", "stream")
"""Options of `zoo.names.load_model` that a cell may have."""

GROUPS = {"client": ClientConfig, "training": LocalTraining, "adapter": LoraConfig}
"""Groups of a setting, and the record that each fills."""

CHAIN = {"clipping": Clipping, "noise": Noise, "pruning": Pruning, "percentile": PercentileFilter, "rounding": Rounding}
"""Defences of gradients, and the record of each; they are done in the order in which a cell has them."""


@dataclass(frozen=True)
class Plan:
    """A cell, made into what does it.

    Attributes:
        model: Options of `load_model`, besides name and device.
        client: What the client does in a step; one seed for its head, whatever drew the batch.
        training: How it trains for several steps; None for one gradient.
        adapter: The adapter that the server hands out first; None for none.
        protection: What the client does against an attack.
        attacker: Who attacks.
        options: The attacker's options.
    """

    model: Mapping[str, Any]
    client: ClientConfig
    training: LocalTraining | None
    adapter: LoraConfig | None
    protection: Protection
    attacker: Attacker
    options: Any


def plan_of(cell: Mapping[str, Any]) -> Plan:
    """Build the records of a cell.

    Args:
        cell: See `cells`.

    Raises:
        DagerError: An option is unknown or may not have its value; the message begins with its dotted name.
    """
    known = set(OPTIONS)
    for name in cell:
        group = name.partition(".")[0]
        if group not in known and name not in AXES:
            raise DagerError(f"{name}: no such group, {advice(group, sorted(known - {'model', 'attack'}))}")
    if cell["attack"] not in ATTACKERS:
        raise DagerError(f"attack {cell['attack']!r}: no such attack, {advice(cell['attack'], sorted(ATTACKERS))}")
    model = group_of(cell, "model")
    check_names("model", model, set(MODEL))
    made = {group: _record(group, record, group_of(cell, group)) for group, record in GROUPS.items()}
    attacker, client = ATTACKERS[cell["attack"]], made["client"] or ClientConfig()
    return Plan(
        model=model,
        client=client,
        training=made["training"],
        adapter=made["adapter"],
        protection=_protection(group_of(cell, "defence"), client.dropout),
        attacker=attacker,
        options=attacker.read(group_of(cell, "attack")),
    )


def _protection(options: Mapping[str, Any], dropout: float) -> Protection:
    """What a client does against an attack: DP-SGD (`privacy`), and a chain of defences in their order."""
    kinds = list(dict.fromkeys(name.partition(".")[0] for name in options))
    check_names("defence", dict.fromkeys(kinds), {"privacy", *CHAIN})
    made = {
        kind: _record(f"defence.{kind}", {"privacy": Privacy, **CHAIN}[kind], group_of(options, kind)) for kind in kinds
    }
    return Protection(dropout, made.pop("privacy", None), tuple(made.values()))


def check_cells(cells: list[Cell], source: str) -> None:
    """Refuse a sweep any of whose cells cannot be done, before the first one is.

    Args:
        cells: All of them.
        source: Where they come from, for messages.

    Raises:
        DagerError: Options are unknown or wrong; all such mistakes are named, each once.
    """
    said: dict[str, None] = {}
    for options in {tuple((name, str(value)) for name, value in _asked(cell)): cell for cell in cells}.values():
        try:
            plan_of(options)
        except DagerError as error:
            said[str(error)] = None
    if said:
        raise DagerError(f"{source}: {'; '.join(said)}")


def _asked(cell: Cell) -> list[tuple[str, Any]]:
    """What of a cell its records depend on."""
    return [(name, value) for name, value in cell.items() if "." in name or name == "attack"]


def _record(group: str, record: Any, options: Mapping[str, Any]) -> Any:
    """A record of the options; None where there are none."""
    if not options:
        return None
    check_names(group, options, {field.name for field in fields(record)})
    try:
        return record(**options)
    except DagerError as error:
        raise DagerError(f"{group}.{error}") from error
