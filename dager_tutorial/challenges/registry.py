"""Which envelopes there are: one record each in `envelopes.toml`, one update file, one model that both sides know.

Chapter `16_sealed_envelopes`. Nothing here knows a text. A set of envelopes is a folder; this package is one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dager_tutorial.challenges.seals import SEALS, Seal, read_seals
from dager_tutorial.errors import DagerError, quote

if TYPE_CHECKING:
    from dager_tutorial.models.language_model import LanguageModel
    from dager_tutorial.update import Update

SHIPPED = Path(__file__).parent
"""The set that comes with the package."""
RECORDS = "envelopes.toml"


@dataclass(frozen=True)
class Envelope:
    """One sealed update, and what the red team is told of it.

    Attributes:
        number: From 1.
        title: A few words.
        story: What is known of client and update, for people.
        setting: How the client made the update; a key of `build.MAKERS`.
        config: The model's configuration, as `config.json` holds it.
        seed: Seed of the model's weights.
        share: Names of the parameters whose gradients, or differences, are sent.
        adapter: Rank, scaling and maps of a low-rank adapter that the server handed out; empty where there is none.
        folder: The set that it belongs to.
    """

    number: int
    title: str
    story: str
    setting: str
    config: dict[str, Any]
    seed: int
    share: tuple[str, ...]
    adapter: dict[str, Any] = field(default_factory=dict)
    folder: Path = SHIPPED

    @property
    def name(self) -> str:
        """The stem of its file, `envelope-01` for the first."""
        return f"envelope-{self.number:02}"

    @property
    def path(self) -> Path:
        """The update file within the set."""
        return self.folder / f"{self.name}.safetensors"

    def seal(self) -> Seal:
        """The hashes that grade a submission.

        Raises:
            DagerError: The set has none for this envelope: it was not built.
        """
        return read_seals(self.folder / SEALS, self.number)

    def content(self) -> bytes:
        """The update file as it is.

        Raises:
            DagerError: It is missing or not the one that was sealed.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DagerError(
                f"{self.path}: cannot be read ({error.strerror}); build or install the set again"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.seal().sha256:
            raise DagerError(f"{self.path}: is not the file that was sealed; build or install the set again")
        return content

    def update(self) -> Update:
        """The update, as the server receives it.

        Raises:
            DagerError: See `content`.
        """
        from dager_tutorial.update import Update

        self.content()
        return Update.load(self.path)

    def model(self) -> LanguageModel:
        """The model that both sides know, drawn from its seed, with the adapter that was handed out, if any."""
        from dager_tutorial.challenges.handed_out import drawn
        from dager_tutorial.zoo.names import load_model

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(self.config), "utf-8")
            model = replace(load_model(f"random:{folder}", seed=self.seed), name=self.name)
        return model.adapted(drawn(model.network, self.adapter, self.seed)) if self.adapter else model

    def adapter_files(self) -> dict[str, bytes]:
        """The files of the adapter that the server handed out, by their names; nothing where there is none."""
        from dager_tutorial.challenges.handed_out import contents

        return contents(self.model().adapter, self.adapter) if self.adapter else {}


def envelopes(folder: Path = SHIPPED) -> tuple[Envelope, ...]:
    """All envelopes of a set, in order.

    Args:
        folder: The set.

    Raises:
        DagerError: It holds no readable records.

    Example:
        >>> [each.number for each in envelopes()][:3]
        [1, 2, 3]
    """
    path = folder / RECORDS
    try:
        content = tomllib.loads(path.read_text("utf-8"))
        found = [_envelope(record, content["models"], folder) for record in content["envelope"]]
    except OSError as error:
        raise DagerError(f"{path}: cannot be read ({error.strerror}); a set of envelopes has this file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DagerError(f"{path}: is no list of envelopes ({quote(repr(error))}); see the shipped one") from error
    return tuple(sorted(found, key=lambda each: each.number))


def envelope(number: int, folder: Path = SHIPPED) -> Envelope:
    """One envelope.

    Args:
        number: Its number.
        folder: The set.

    Raises:
        DagerError: There is no such envelope.

    Example:
        >>> envelope(1).name
        'envelope-01'
    """
    known = {each.number: each for each in envelopes(folder)}
    if number not in known:
        raise DagerError(f"there is no envelope {number}: choose one of {', '.join(map(str, known))}")
    return known[number]


def _envelope(record: dict[str, Any], models: dict[str, Any], folder: Path) -> Envelope:
    """One record, with the model that it names written out."""
    model = models[record["model"]]
    told = {key: str(record[key]) for key in ("title", "story", "setting")}
    number, seed, adapter = int(record["number"]), int(record["seed"]), dict(model.get("adapter", {}))
    config, share = dict(model["config"]), tuple(model["share"])
    return Envelope(number, **told, config=config, seed=seed, share=share, adapter=adapter, folder=folder)
