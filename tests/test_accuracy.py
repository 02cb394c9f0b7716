"""A series of batches: what is exact, what is false, and how many rows there were, counted by hand."""

import json

import pytest

from dager_tutorial.cli import main
from dager_tutorial.client.config import ClientConfig
from dager_tutorial.client.masking import masked_inputs
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation import accuracy
from dager_tutorial.evaluation.accuracy import Batch, bench_accuracy
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Status

TEXTS = ["the old man walks to the sea", "the old dog sleep", "we had good tea"]
KINDS = [
    ("tiny_llama", "classification", "certified"),
    ("tiny_llama", "next_token", "rows_complete"),
    ("tiny_bert", "classification", "certified"),
    ("tiny_masked_bert", "masked", "texts_complete"),
]


def seen(model, texts, task):
    """What the network sees of each text and can be recovered, from the tokenizer alone."""
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    if task == "masked":
        ids = masked_inputs(model.tokenizer, ids, 0)[0]
    return [tuple(tokens[:-1] if task == "next_token" else tokens) for tokens in ids]


def rows_of(model, sequences):
    """Distinct beginnings for a causal model, all tokens of distinct texts for an encoder."""
    if model.name == "tiny-llama":
        return len({ids[:end] for ids in sequences for end in range(1, len(ids) + 1)})
    return sum(len(ids) for ids in set(sequences))


@pytest.mark.parametrize(("name", "task", "status"), KINDS)
def test_a_batch_that_comes_back_whole(name, task, status, random_texts, request):
    model, texts = request.getfixturevalue(name), random_texts(3, 12, 4, 6)
    wanted = seen(model, texts, task)
    config = ClientConfig(task=task, share="attention")
    (run,) = bench_accuracy(model, [Batch("words", 12, texts)], config=config)
    assert (run.data, run.seed, run.batch_size, run.exact, run.false) == ("words", 12, 3, 1.0, 0)
    assert (run.n_tokens, run.status) == (sum(len(model.tokenizer(text)["input_ids"]) for text in texts), status)
    assert run.rows == rows_of(model, wanted)


@pytest.mark.parametrize(("name", "task", "status"), KINDS)
def test_a_text_that_is_found_and_one_that_is_made_up(name, task, status, random_texts, monkeypatch, request):
    model, texts = request.getfixturevalue(name), random_texts(3, 12, 4, 6)
    truth = seen(model, texts, task)[0]
    spoilt = Reconstruction((truth, (7, 7)), ("a", "b"), (1.0, 1.0), Status.PARTIAL, seconds={"total": 0.5})
    monkeypatch.setattr(accuracy, "attack", lambda *_, **__: spoilt)
    (run,) = bench_accuracy(model, [Batch("words", 12, texts)], config=ClientConfig(task=task))
    assert (run.exact, run.false, run.status, run.seconds) == (pytest.approx(1 / 3), 1, "partial", 0.5)
    assert json.loads(json.dumps(run.to_json())) == run.to_json()
    assert type(run.status) is str


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_a_text_that_occurs_twice_gives_its_rows_once(name, monkeypatch, request):
    model = request.getfixturevalue(name)
    nothing = Reconstruction((), (), (), Status.NOISE, seconds={"total": 0.5})
    monkeypatch.setattr(accuracy, "attack", lambda *_, **__: nothing)
    (run,) = bench_accuracy(model, [Batch("words", 0, [TEXTS[1]] * 2)], config=ClientConfig())
    assert (run.batch_size, run.rows) == (2, len(model.tokenizer(TEXTS[1])["input_ids"]))
    assert (run.n_tokens, run.exact, run.false) == (2 * run.rows, 0, 0)


def test_batches_are_attacked_one_by_one_with_what_the_client_is_asked(tiny_gpt2, monkeypatch):
    shared = []

    def attack(model, update, **_):
        shared.append(list(update.gradients))
        return Reconstruction((), (), (), Status.NOISE, seconds={"total": 0.5})

    monkeypatch.setattr(accuracy, "attack", attack)
    name = "transformer.h.0.attn.c_attn.weight"
    batches = [Batch("words", 0, TEXTS[:1]), Batch("words", 1, TEXTS[1:], [1, 0]), Batch("words", 2, [])]
    runs = bench_accuracy(tiny_gpt2, batches, config=ClientConfig(share=(name,)))
    assert (next(runs).seed, len(shared)) == (0, 1)
    assert (next(runs).seed, shared) == (1, [[name], [name]])
    with pytest.raises(DagerError, match="the batch is empty"):
        next(runs)


def test_the_command_prints_a_line_a_batch_and_writes_them(tiny_gpt2, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dager_tutorial.zoo.names.load_model", lambda *_, **__: tiny_gpt2)
    data, result = tmp_path / "words.tsv", tmp_path / "runs.json"
    data.write_text("label\ttext\n" + "".join(f"{i % 2}\t{text}\n" for i, text in enumerate(TEXTS)), "utf-8")
    options = ["--batch-size", "1", "--batch-size", "2", "--batches", "2", "--json", str(result)]
    assert main(["bench", "accuracy", "--model", "tiny", "--data", str(data), *options]) == 0
    runs = json.loads(result.read_text("utf-8"))["runs"]
    assert [(run["batch_size"], run["seed"], run["exact"]) for run in runs] == [
        (1, 0, 1.0), (1, 1, 1.0), (2, 0, 1.0), (2, 1, 1.0)
    ]  # fmt: skip
    assert capsys.readouterr().out.count("exact=1.000") == 4
