"""The instructor's script, from private texts to a set of envelopes: `python -m dager_tutorial.challenges.build -h`.

Chapter `16_sealed_envelopes`. The folder of the set holds `envelopes.toml`, which everybody may read. The private texts
are a TOML file that stays with the instructor: for each envelope a table `[envelope.N]` with `texts` and, where wanted,
`labels`, `client` (options of `ClientConfig`), `training` (of `LocalTraining`), `defences` (names of `DEFENCES`, each
with its options, in order), `noise` (a multiple of each gradient's root mean square, behind them) and `cause`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dager_tutorial.challenges.answers import ANSWERS, locked, new_key, read_key, write_key
from dager_tutorial.challenges.registry import SHIPPED, Envelope, envelopes
from dager_tutorial.challenges.seals import SEALS, Seal, sealed, seals_text
from dager_tutorial.client.batch import Truth
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defenses.chain import Defence, protected
from dager_tutorial.client.defenses.clipping import Clipping
from dager_tutorial.client.defenses.pruning import Pruning
from dager_tutorial.client.federated import LocalTraining, play_locally
from dager_tutorial.client.step import play
from dager_tutorial.errors import DagerError
from dager_tutorial.models.language_model import LanguageModel
from dager_tutorial.server.attack import attack
from dager_tutorial.update import Update

Private = Mapping[str, Any]
DEFENCES: dict[str, Callable[..., Defence]] = {"clipping": Clipping, "pruning": Pruning}
"""Defences of which nothing is drawn that a red team could draw again."""
Maker = Callable[[LanguageModel, Envelope, Private], tuple[Update, Truth]]


def one_step(model: LanguageModel, envelope: Envelope, private: Private) -> tuple[Update, Truth]:
    """One step of FedSGD, with defences and Gaussian noise on every entry where the private record says so.

    Args:
        model: The envelope's.
        envelope: What the red team is told.
        private: The instructor's record.
    """
    options = {"share": envelope.share, **private.get("client", {})}
    update, truth = play(model, private["texts"], private.get("labels"), config=ClientConfig(**options))
    chain = [DEFENCES[name](**record) for name, record in private.get("defences", {}).items()]
    update = protected(update, chain)[0] if chain else update
    return (_noisy(update, float(private["noise"])) if "noise" in private else update), truth


def federated_averaging(model: LanguageModel, envelope: Envelope, private: Private) -> tuple[Update, Truth]:
    """A round of local training, as the private record says; what travels is how far the weights moved.

    Args:
        model: The envelope's.
        envelope: What the red team is told.
        private: The instructor's record.
    """
    config = ClientConfig(**{"share": envelope.share, **private.get("client", {})})
    training = LocalTraining(**private.get("training", {}))
    return play_locally(model, private["texts"], private.get("labels"), config=config, training=training)


MAKERS: dict[str, Maker] = {"one step": one_step, "federated averaging": federated_averaging}
"""How an update is made, by the setting that a record names. A chapter that adds a setting adds an entry."""


def build(texts: Path, key: bytes, folder: Path = SHIPPED) -> dict[int, Seal]:
    """Write the update files, seals and locked answers of a set.

    Args:
        texts: The private texts.
        key: The instructor's key.
        folder: The set, which holds `envelopes.toml`.

    Returns:
        Envelope number to its seal.

    Raises:
        DagerError: The texts cannot be read, or lack an envelope.
    """
    records, private = envelopes(folder), _private(texts)
    missing = [each.number for each in records if str(each.number) not in private]
    if missing:
        raise DagerError(f"{texts}: has no table [envelope.{missing[0]}]; every envelope needs one")
    seals = {each.number: _filled(each, private[str(each.number)]) for each in records}
    (folder / SEALS).write_text(seals_text(seals), "utf-8")
    (folder / ANSWERS).write_bytes(locked(private, key))
    return seals


def _filled(envelope: Envelope, private: Private) -> Seal:
    """Write one update file, attack it to learn what full marks can ask for, and seal its texts."""
    model = envelope.model()
    update, truth = MAKERS[envelope.setting](model, envelope, private)
    replace(update, model=envelope.name).save(envelope.path)
    envelope.path.chmod(0o644)
    found, texts = set(attack(model, update).confirmed), set(truth.sequences)
    least = len(found & texts)
    goal = "whole" if found == texts else "part" if least else "cause"
    sha256 = hashlib.sha256(envelope.path.read_bytes()).hexdigest()
    print(f"{envelope.name}: {len(texts)} texts, {least} confirmed, {len(found - texts)} in vain: {goal}")
    return sealed(texts, goal, least, sha256)


def _noisy(update: Update, scale: float) -> Update:
    """The update with noise that nobody can draw again."""
    draw = torch.Generator()
    draw.seed()
    noisy = {}
    for name, gradient in update.gradients.items():
        noise = torch.randn(gradient.shape, generator=draw).to(gradient.dtype)
        noisy[name] = gradient + scale * gradient.square().mean().sqrt() * noise
    return Update(noisy)


def _private(path: Path) -> dict[str, Any]:
    """The private records, by number."""
    try:
        return dict(tomllib.loads(path.read_text("utf-8"))["envelope"])
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); name the private texts") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DagerError(f"{path}: holds no tables [envelope.N] ({error!r})") from error


def main(arguments: list[str] | None = None) -> int:
    """Build a set of envelopes from private texts. A key that does not exist yet is drawn and written.

    Args:
        arguments: The command line's; the process's by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m dager_tutorial.challenges.build", description=main.__doc__)
    parser.add_argument("texts", type=Path, help="the private texts, a TOML file")
    parser.add_argument("--key", type=Path, required=True, help="the file with the instructor's key")
    parser.add_argument("--set", dest="folder", type=Path, default=SHIPPED, help="a folder with envelopes.toml")
    given = parser.parse_args(arguments)
    try:
        if not given.key.exists():
            write_key(given.key, new_key())
        build(given.texts, read_key(given.key), given.folder)
    except DagerError as error:
        print(f"build: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
