"""Options stand once: every command that has one means the same by it, and help and mistakes come without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from typing import Annotated, get_args, get_type_hints

import pytest
import typer

from dager_tutorial.cli import bench, main
from dager_tutorial.cli.app import app
from dager_tutorial.cli.options import (
    BatchOptions,
    ClientOptions,
    SeriesOptions,
    TruthOptions,
    flattened,
)
from dager_tutorial.client import config as client
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation.ablation import VARIANTS


def commands(group=None, words=()):
    """Every command and group below, with the words that call it."""
    group = group or typer.main.get_command(app)
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


ALL = dict(commands())
LEAVES = [words for words, command in ALL.items() if not getattr(command, "commands", None)]
# A submission is read from --json, not written: the game has options of its own.
WORK = [words for words in LEAVES if words[0] != "challenge"]


def options_of(command):
    """The options of a command, by their first long name."""
    return {option.opts[0]: option for option in command.params if option.opts[0].startswith("--")}


def bounds_of(option):
    """The least and the largest number that an option takes: typer keeps them in its type, in newer versions beside."""
    kept = getattr(option, "type", option)
    return getattr(kept, "min", None), getattr(kept, "max", None)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_shows_each_option_once(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main([*words, "--help"]) == 0
    shown = Counter(re.findall(r"^│[ *]*(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown == Counter({**dict.fromkeys(options_of(ALL[words]), 1), "--help": 1})


def test_commands_mean_the_same_by_an_option():
    meanings = defaultdict(set)
    for words in WORK:
        for option in options_of(ALL[words]).values():
            for name in (*option.opts, *option.secondary_opts):
                meanings[name].add((option.help, *bounds_of(option), option.multiple))
    differing = {name: len(said) for name, said in meanings.items() if len(said) > 1}
    assert differing == {
        "--batch-size": 5,  # of the demonstration, of a batch, of a series, of one benchmark, of growing ones
        "--data": 3,  # of a batch, of a benchmark, of a series
        "-o": 2,
        "--out": 2,  # an update, and an audit's page
        "--picture": 2,  # of growth, and of the paper's figures
        "--seed": 2,  # `models export` draws weights and nothing else
        "--steps": 2,  # of the budget of DP-SGD, and of an earlier attack's optimiser
        "--time-budget": 2,  # `bench encoder` does not stop the textbook
    }


def test_every_command_has_what_the_manual_promises_of_all():
    for words in WORK:
        known = options_of(ALL[words])
        assert "--json" in known
        if "--model" in known:
            assert {"--device", "--seed", "--blocks", "--threads", "--model-seed"} <= set(known)


@pytest.mark.parametrize("name", ["--out", "--svg", "--json"])
def test_every_output_is_checked_before_the_work(name, tmp_path):
    commands = [words for words in ALL if words[:2] != ("challenge", "submit")]
    options = [known[name] for known in (options_of(ALL[words]) for words in commands) if name in known]
    assert options
    for option in options:
        with pytest.raises(DagerError, match="is a folder"):
            option.callback(None, option, tmp_path)


def test_the_client_of_the_command_line_is_the_client():
    options = get_type_hints(ClientOptions)
    constants = {
        "task": client.TASKS,
        "loss": client.LOSSES,
        "dtype": client.DTYPES,
        "padding_side": client.PADDING_SIDES,
    }
    assert {name: get_args(options[name]) for name in constants} == constants
    known = {field.name: field for field in fields(ClientConfig)}
    assert set(known) == set(options) | {"seed", "head_std", "dropout"}
    assert ClientOptions().config(seed=0) == ClientConfig() == TruthOptions().config(seed=0)
    given = {"task": "next_token", "loss": "frobenius", "dtype": "float16", "padding_side": "left", "max_length": 7}
    assert ClientOptions(**given, share=" a.b , c").config(3) == ClientConfig(**given, share=("a.b", "c"), seed=3)
    assert TruthOptions("masked", 7).config(3) == ClientConfig(task="masked", max_length=7, seed=3)
    assert ClientOptions(share="attention").config(0).share == "attention"


def test_the_variants_of_the_command_line_are_those_of_the_ablation():
    assert tuple(bench.VARIANTS) == tuple(VARIANTS)


def test_a_batch_is_given_or_drawn(tmp_path):
    data = tmp_path / "words.tsv"
    data.write_text("label\ttext\n" + "".join(f"{index}\ttext {index}\n" for index in range(9)))
    texts, labels = BatchOptions(str(data)).draw(0)
    assert len(texts) == 8 and texts == [f"text {label}" for label in labels]
    assert (
        BatchOptions(str(data), 3).draw(1) == BatchOptions(str(data), 3).draw(1) != BatchOptions(str(data), 3).draw(2)
    )
    assert BatchOptions(text=["a"]).draw(0, [5]) == (["a"], [5])
    with pytest.raises(DagerError, match=r"--text .* is not valid UTF-8"):
        BatchOptions(text=["snow", "\udcff"]).draw(0)


def test_a_series_is_every_source_and_size_with_seeds_counted_up(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.tsv").write_text("label\ttext\n" + "".join(f"0\t{name} {index}\n" for index in range(9)))
    sources = [str(tmp_path / "first.tsv"), str(tmp_path / "second.tsv")]
    series = SeriesOptions(sources, [2, 3], 2).draw(5)
    assert [(batch.data, batch.seed, len(batch.texts), len(batch.labels)) for batch in series] == [
        (name, seed, size, size) for name in ("first", "second") for size in (2, 3) for seed in (5, 6)
    ]
    for batch in series:
        assert (batch.texts, batch.labels) == BatchOptions(str(tmp_path / f"{batch.data}.tsv"), len(batch.texts)).draw(
            batch.seed
        )


@dataclass(frozen=True)
class Place:
    city: Annotated[str, typer.Option("--city")]
    number: Annotated[int, typer.Option("--number")] = 1


ELSEWHERE = Place("Rome", 7)


def called(command, *arguments):
    single = typer.Typer()
    single.command()(command)
    return single(args=arguments, standalone_mode=False)


def test_a_command_gets_the_records_built_and_everything_else_as_it_is():
    calls = []

    @flattened
    def visit(*, place: Place, fast: bool = False) -> None:
        """Go there."""
        calls.append((place, fast))

    @flattened
    def stay(*, place: Place = ELSEWHERE) -> None:
        calls.append(place)

    assert (visit.__name__, visit.__doc__) == ("visit", "Go there.")
    called(visit, "--city", "Paris")
    called(visit, "--city", "Paris", "--number", "3", "--fast")
    called(stay)
    called(stay, "--number", "2")
    assert calls == [(Place("Paris"), False), (Place("Paris", 3), True), ELSEWHERE, Place("Rome", 2)]
    with pytest.raises(typer.BadParameter) as missing:
        called(visit)
    assert "--city" in missing.value.format_message()


def test_an_option_cannot_stand_twice_in_a_command():
    def twice(*, there: Place, here: Place) -> None: ...

    def clash(*, there: Place, city: str) -> None: ...

    for command in (twice, clash):
        with pytest.raises(ValueError, match="duplicate parameter name"):
            flattened(command)


QUICK = """
import sys
sys.modules["resource"] = None  # as on Windows: importing it fails
import dager_tutorial
from dager_tutorial.cli import bench, demo, display, main, models, options, output, parties, progress
for words in {leaves}:
    assert main([*words, "--help"]) == 0
for words in ([], ["bench", "--help"], ["models", "--help"], ["--version"]):
    assert main(words) == 0
for words in (["recuperate"], ["recover"], ["attack", "--model", "m"], ["attack", "--model", "m", "--data", "notes",
        "--text", "a"], ["attack", "--model", "m", "--data", "no-such-texts"], ["demo", "--json", "absent/file"],
        ["recover", "u", "--model", "m", "--device", "abacus"], ["bench"]):
    assert main(words) == 2, words
assert not {{"torch", "transformers", "tqdm"}} & set(sys.modules)
del sys.modules["resource"]  # torch and psutil know when not to ask for it
import dager_tutorial.server.attack
from dager_tutorial import ClientConfig, attack, client_update, load_model, play, score
assert all(callable(call) for call in (attack, client_update, load_model, play, score, dager_tutorial.attack))
"""


def test_help_and_mistakes_load_no_torch_and_the_calls_of_the_quick_start_keep_their_names():
    script = QUICK.format(leaves=[list(words) for words in LEAVES])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
