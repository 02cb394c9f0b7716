"""`dager audit`: the page and the JSON say the same, show no text unless asked, and nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from helpers import saved

from dager_tutorial.cli import main
from dager_tutorial.client.adapters import LoraConfig, hand_out
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.defenses.chain import protected
from dager_tutorial.client.step import play
from dager_tutorial.evaluation import changes
from dager_tutorial.evaluation.ladder import UNREADABLE, Rung, climb, taken_for_true
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.report import sentences
from dager_tutorial.report.facts import About, gather, with_ladder
from dager_tutorial.report.page import page
from dager_tutorial.report.sent import Source, source_of
from dager_tutorial.server.attack import attack
from dager_tutorial.status import Certainty, Confirmation, Status
from dager_tutorial.update import Update

TEXTS = ["hungry husband breakfast", "sister kitchen hospital holiday", "beautiful mountain winter"]
PRIVATE = sorted({word for text in TEXTS for word in text.split()})
BATCH = [part for text in TEXTS for part in ("--text", text)]
ADAPTED = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
KEYS = {
    "": "schema headline shows_texts sent readings given compared ladder about",
    "headline": "severity sentence reason",
    "sent": "source network named_model update_kind learning_rate numbers length dtypes parts tensors",
    "sent.source": "file size sha256",
    "sent.parts": "kind tensors numbers tensors_there blocks",
    "readings": "precision unmoved named maps spectra",
    "readings.named": "tokens positions words",
    "readings.maps": "name block kind width rank noise clear saturated",
    "readings.spectra": "name rank width edge points",
    "given": "status meaning advice diagnosis texts batch_size with_targets unexplained seconds peak_memory_mb "
    "numbers_read",
    "given.texts": "tokens certainty proven copies labelled ratio labels text",
    "compared": "texts exact tokens token_accuracy rouge1 rouge2 rouge_l own",
    "compared.own": "tokens exact share text recovered",
    "ladder": "kind name level deviation status exact words confirmed others seconds",
    "about": "command date versions live",
}


class Seen(HTMLParser):
    """The tags, attributes and comments of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.comments: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def assert_inert(written: str) -> None:
    """Nothing on a page runs, and nothing asks anybody for anything."""
    seen = Seen(written)
    assert not seen.tags & {"script", "iframe", "object", "embed", "link", "img", "form", "base", "a", "foreignobject"}
    assert not {name for name in seen.attributes if name.startswith("on")} | (
        seen.attributes & {"src", "href", "action"}
    )
    assert not re.search(r"url\(|@import|https?:", written) and seen.comments == []
    assert "default-src 'none'" in written


@pytest.fixture(scope="module")
def folder(tiny_gpt2, tmp_path_factory):
    return saved(tiny_gpt2, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def captured(folder, tmp_path_factory):
    """The update of `TEXTS` and the texts themselves, as files."""
    place = tmp_path_factory.mktemp("captured")
    assert main(["capture", "--model", folder, *BATCH, "--out", str(place / "update.safetensors")]) == 0
    rows = "".join(f"{index % 2}\t{text}\n" for index, text in enumerate(TEXTS))
    (place / "truth.tsv").write_text(f"label\ttext\n{rows}")
    return place


def audited(arguments, place):
    """The page and the JSON of an audit."""
    out, record = place / "page.html", place / "audit.json"
    assert main(["audit", *arguments, "--out", str(out), "--json", str(record)]) == 0
    return out.read_text("utf-8"), record.read_text("utf-8")


def test_an_audit_of_a_file_hides_every_word_and_says_everything_else(folder, captured, tmp_path, capsys):
    update = str(captured / "update.safetensors")
    arguments = [update, "--model", folder, "--truth", str(captured / "truth.tsv")]
    written, record = audited(arguments, tmp_path)
    shown = capsys.readouterr().out
    assert [word for word in PRIVATE if word in (written + record + shown).lower()] == []
    assert_inert(written)
    facts = json.loads(record)
    assert facts["schema"] == "dager-audit/1" and facts["given"]["status"] == "certified"
    for path, keys in KEYS.items():
        value = facts
        for name in filter(None, path.split(".")):
            value = value[name][0] if isinstance(value[name], list) else value[name]
        assert list(value) == keys.split(), path
    assert facts["headline"]["sentence"] == "This update gives away all 3 texts, word for word."
    assert [text["tokens"] for text in facts["given"]["texts"]] == [4, 3, 3]
    assert facts["compared"]["exact"] == 3 and [own["share"] for own in facts["compared"]["own"]] == [1, 1, 1]
    assert facts["readings"]["named"]["tokens"] == len(PRIVATE) and facts["readings"]["named"]["words"] is None
    assert {part["kind"]: part["tensors"] for part in facts["sent"]["parts"]}["head"] == 1
    assert facts["headline"]["sentence"] in written and facts["sent"]["source"]["sha256"] in written


def test_texts_are_shown_when_asked_for(folder, captured, tmp_path):
    update = str(captured / "update.safetensors")
    arguments = [update, "--model", folder, "--show-texts", "--no-changes", "--truth", str(captured / "truth.tsv")]
    for part in audited(arguments, tmp_path):
        assert all(part.count(text) >= 2 for text in TEXTS)


@pytest.mark.parametrize(
    ("training", "said"),
    [([], "A <b>gradient</b>"), (["--epochs", "2", "--mini-batch", "2", "--local-lr", "1e-3"], "weight difference")],
)
def test_a_live_audit_computes_the_update_and_keeps_the_texts_out_of_the_command(folder, training, said, tmp_path):
    written, record = audited(["--model", folder, *BATCH, "--label", "7", *["--label", "1"] * 2, *training], tmp_path)
    assert [word for word in PRIVATE if word in (written + record).lower()] == []
    facts = json.loads(record)
    assert facts["about"]["live"] and facts["about"]["command"].count("--text '▮▮▮▮'") == len(TEXTS)
    assert facts["about"]["command"].startswith("dager audit --model ") and "--label 7" not in facts["about"]["command"]
    assert said in written
    assert facts["sent"]["source"]["file"] is None and facts["compared"]["exact"] == len(TEXTS)
    kinds = {rung["kind"] for rung in facts["ladder"]}
    assert kinds == {"as sent", "clipping", "noise", "rounding", "sharing"}
    by_name = {rung["name"]: rung for rung in facts["ladder"]}
    assert by_name["as it was sent"]["exact"] == 1 and by_name["clipped to a tenth of its norm"]["words"] == 1
    assert facts["ladder"][-1]["words"] <= 1 and sum(rung["others"] for rung in facts["ladder"]) == 0
    private = [rung for rung in facts["ladder"] if rung["kind"] == "noise"][-1]
    assert private["deviation"] == pytest.approx(1) and private["confirmed"] == 0


def test_names_and_texts_of_strangers_stay_text(tiny_gpt2):
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"
    model = replace(tiny_gpt2, name=evil)
    update, truth = play(model, TEXTS)
    update = Update(update.gradients | {f'"><{evil}': torch.ones(2, 2)}, model=evil)
    found = replace(attack(model, update), diagnosis=evil)
    found = replace(found, texts=(evil,) * len(found.texts))
    truth = replace(truth, texts=(evil,) * len(TEXTS))
    about = About(evil, evil, {evil: evil}, live=False)
    facts = gather(model, update, found, source=Source(evil, 1, evil), about=about, truth=truth, show_texts=True)
    rungs = climb(model, update, truth, changes=[changes.Change("noise", evil, 1.0, lambda update: update)])
    written = page(with_ladder(facts, tuple(rungs)))
    assert written.count("&lt;script&gt;") >= 10
    assert_inert(written)


def test_an_update_that_gives_nothing_away_is_not_called_safe(folder, captured, tmp_path):
    update = Update.load(captured / "update.safetensors")
    noised, _ = protected(update, [changes.noise_as_long(update, 1000.0)])
    noised.save(tmp_path / "noised.safetensors")
    written, record = audited([str(tmp_path / "noised.safetensors"), "--model", folder], tmp_path)
    facts = json.loads(record)
    assert facts["headline"]["severity"] == "open" and "no proof that it is safe" in facts["headline"]["reason"]
    assert facts["ladder"] == [] and "nothing to compare a change with" in written
    assert_inert(written)


@pytest.mark.parametrize(
    ("model", "adapted"),
    [("tiny_bert", False), ("tiny_llama", False), ("tiny_llama", True), ("tiny_gpt2", True)],
    indirect=["model"],
)
def test_every_architecture_and_an_adapter_has_a_page(model, adapted):
    if adapted:
        model = hand_out(model, LoraConfig(rank=48, targets=ADAPTED[model.network.config.model_type]), texts=TEXTS)
    update, truth = play(model, TEXTS)
    found = attack(model, update)
    about = About("", "", {}, live=True)
    facts = gather(model, update, found, source=Source(), about=about, truth=truth)
    assert facts.compared.exact == 3 and facts.headline.severity == "severe", found.diagnosis
    parts = {part.kind: part for part in facts.sent.parts}
    assert parts["attention"].blocks == 3 and sum(part.tensors for part in parts.values()) == len(update.gradients)
    assert ((parts["embeddings"].tensors == 0) is adapted and parts["attention"].tensors_there is None) or not adapted
    written = page(facts)
    assert "No change was tried" in written and ("rank 48" in written) is adapted
    assert_inert(written)


def test_changes_leave_the_update_as_it_is_and_the_texts_found_stand_in_for_the_truth(tiny_gpt2):
    update, _ = play(tiny_gpt2, TEXTS, config=ClientConfig(task="next_token"))
    before = {name: tensor.clone() for name, tensor in update.gradients.items()}
    found = attack(tiny_gpt2, update)
    goal = taken_for_true(tiny_gpt2, found)
    made = changes.usual_changes(tiny_gpt2, update)
    assert found.with_targets and {len(ids) for ids in goal.wholes} == {3, 4}
    rungs = list(climb(tiny_gpt2, update, goal, changes=made[:2]))
    assert [rung.exact for rung in rungs] == [1, 1]
    for change in made:
        assert change.make(update).kind == update.kind
    assert all(torch.equal(tensor, before[name]) for name, tensor in update.gradients.items())
    smaller = [change for change in made if change.kind == "sharing"]
    assert [change.name for change in smaller][:2] == ["without the embeddings", "attention alone"]
    assert all(0 < change.level < 1 for change in smaller)
    assert {name for name in smaller[1].make(update).gradients if "attn" not in name} == set()


MISTAKES = {
    "leave out --data": ["UPDATE", "--model", "MODEL", "--data", "notes"],
    "name it, too": ["--model", "MODEL", "--text", "a", "--truth", "truth.tsv"],
    "give the texts either with --data": ["--model", "MODEL"],
    "no such file": ["missing.safetensors", "--model", "MODEL"],
    "truth.tsv": ["UPDATE", "--model", "MODEL", "--truth", "missing/truth.tsv"],
    "is no regular file": ["UPDATE", "--model", "MODEL", "--out", "/dev/null"],
    "audit.html is there already": ["UPDATE", "--model", "MODEL"],
}


@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line(message, arguments, folder, captured, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.html").write_text("mine")
    if "already" not in message and "--out" not in arguments:
        arguments = [*arguments, "--out", "page.html"]
    known = {"UPDATE": str(captured / "update.safetensors"), "MODEL": folder}
    assert main(["audit", *(known.get(each, each) for each in arguments)]) == 2
    output, line = capsys.readouterr()
    assert not output and line.startswith("dager: error: ") and line.count("\n") == 1
    assert message in line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("audit.html", "mine")]


def test_every_status_has_its_words():
    assert set(sentences.SHORT) == {status.value for status in Status} | {UNREADABLE}
    for status in Status:
        said = sentences.headline(Reconstruction((), (), (), status), None)
        assert said.severity == "open" and sentences.NO_PROOF in said.reason
        proven = Reconstruction(((5,),), ("a",), (1.0,), status, (Confirmation(Certainty.WHOLE),))
        said = sentences.headline(proven, None)
        assert said.severity == "severe" and ("at least" in said.sentence) is not status.claims_all
        assert ("as long as that noise" in said.reason) is (status is Status.CERTIFIED)  # no share is left: noise is


def test_what_was_stopped_by_the_clock_is_not_called_stopped_by_the_change():
    clipped = Rung("clipping", "clipped", 0.1, 0.0, "certified", 1.0, 1.0, 1.0, 0, 1.0)
    noise = [Rung("noise", f"{level}", level, 0.0, "partial", 0.0, 0.1, 0.0, 0, 1.0) for level in (0.1, 1.0)]
    said = sentences.ladder_summary([clipped, replace(noise[0], status="out_of_time"), noise[1]])
    assert said[0].startswith("Clipping alone leaves 100 %")
    assert said[1] == "Noise 1 times as long as the update keeps this attack below a fifth."
    assert said[2].startswith("For 1 of 3 lines the time was too short")


def test_a_checkpoint_is_known_by_the_hash_of_its_optimiser_state(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    known = Source("optimizer.pt", 5, hashlib.sha256(b"state").hexdigest())
    assert source_of(tmp_path) == source_of(tmp_path / "optimizer.pt") == known
