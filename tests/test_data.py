"""TSV files good and bad, the project's own texts, and batches."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dager_tutorial import data
from dager_tutorial.data import Example, load_texts, sample_batch
from dager_tutorial.errors import DagerError

HEADER = b"label\ttext\n"


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "texts.tsv"

    def write(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    return write


# Anything but what the format itself uses: tab, line feed, and a carriage return at a line's end.
characters = st.characters(exclude_characters="\t\n", exclude_categories=["Cs"])
rows = st.lists(
    st.tuples(
        st.integers(0, 9999),
        st.text(characters, min_size=1).filter(lambda text: text.strip() and text[-1] != "\r"),
    ),
    min_size=1,
    max_size=5,
)


@example([(0, "a\rb\u2028c\x0bd\x85e")], "\n", True, b"")
@given(rows, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_reads_what_was_written(tmp_path_factory, rows, newline, ended, mark):
    lines = ["label\ttext", *(f"{label}\t{text}" for label, text in rows)]
    path = tmp_path_factory.getbasetemp() / "written.tsv"
    path.write_bytes(mark + (newline.join(lines) + newline * ended).encode())
    assert load_texts(path) == [Example(label, text) for label, text in rows]


def test_quotes_are_characters(tsv):
    content = HEADER + b'1\t"a "" b\n0\tit\'s "so\n'
    assert load_texts(str(tsv(content))) == [(1, '"a "" b'), (0, "it's \"so")]


@pytest.mark.parametrize(
    ("content", "place", "advice"),
    [
        (b"", "", "empty"),
        (b"\n\r\n \n", "", "empty"),
        (HEADER, "", "no texts"),
        (b"1\ta cat\n0\ta dog\n", ", line 1", "header"),
        (b"text\tlabel\na cat\t1\n", ", line 1", "header"),
        (b"label\ttext\tsource\n1\ta\tb\n", ", line 1", "header"),
        (b"PK\x03\x04\xff\xfe\x00" * 99, ", line 1", "UTF-8"),
        (HEADER + b"1\ta\n0 a dog\n", ", line 3", "column"),
        (HEADER + b"1\ta\tb\n", ", line 2", "column"),
        (HEADER + b"1\ta\n\n0\tb\n", ", line 3", "column"),
        (HEADER + b"good\ta\n", ", line 2", "whole number"),
        (HEADER + b"1.0\ta\n", ", line 2", "whole number"),
        (HEADER + b"-1\ta\n", ", line 2", "whole number"),
        (HEADER + "١\ta\n".encode(), ", line 2", "whole number"),
        (HEADER + b"9" * 5000 + b"\ta\n", ", line 2", "whole number"),
        (HEADER + b"1\ta\n1\t \n", ", line 3", "blank"),
        (HEADER + b"1\ta\n1\tcaf\xe9\n", ", line 3", "UTF-8"),
        (HEADER.decode().encode("utf-16"), ", line 1", "UTF-8"),
    ],
)
def test_malformed_file(tsv, content, place, advice):
    path = tsv(content)
    with pytest.raises(DagerError) as caught:
        load_texts(path)
    line = str(caught.value)
    assert line.startswith(f"'{path}'{place}: ")
    assert advice in line
    assert "\n" not in line
    assert len(line) < len(str(path)) + 200


@pytest.mark.parametrize(("name", "advice"), [("", "directory"), ("nowhere.tsv", "names: reviews"), ("a\0b", "read")])
def test_no_file(tmp_path, name, advice):
    with pytest.raises(DagerError, match=advice) as caught:
        load_texts(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_split_of_a_file_is_an_error(tsv):
    with pytest.raises(DagerError, match="split 'test'"):
        load_texts(tsv(HEADER + b"1\ta\n"), split="test")


@pytest.mark.parametrize(("name", "at_least"), [("reviews", 300), ("grammar", 400), ("notes", 60), ("passages", 12)])
def test_own_texts(name, at_least):
    examples = load_texts(name)
    texts = [example.text for example in examples]
    assert len(examples) >= at_least
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() for text in texts)


def test_grammar_is_balanced():
    labels = Counter(example.label for example in load_texts("grammar"))
    assert set(labels) == {0, 1}
    assert labels[0] == labels[1]


class FakeDatasets:
    """Stands in for the package `datasets`, which needs a network."""

    def __init__(self, rows=(), error=None):
        self.rows, self.error = rows, error

    def load_dataset(self, name, configuration, *, split):
        self.asked = (name, configuration, split)
        if self.error:
            raise self.error
        return self.rows


@pytest.mark.parametrize("name", data.PUBLIC)
def test_public_corpus(monkeypatch, name):
    dataset, configuration, column = data.PUBLIC[name]
    fake = FakeDatasets([{"label": 1, column: "a cat"}, {"label": 0, column: " "}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_texts(name, split="validation") == [(1, "a cat")]
    assert fake.asked == (dataset, configuration, "validation")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (None, "pip install datasets"),
        (FakeDatasets(error=ConnectionError("no route\nto host")), "no route to host"),
        (FakeDatasets(error=ValueError()), "ValueError"),
        (FakeDatasets([{"label": -1, "sentence": "a cat"}]), "withheld"),
        (FakeDatasets([]), "no texts"),
    ],
)
def test_public_corpus_out_of_reach(monkeypatch, fake, reason):
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DagerError, match=reason) as caught:
        load_texts("cola")
    assert str(caught.value).startswith("cola")
    assert "\n" not in str(caught.value)


def test_batches_are_drawn_once_each_and_by_seed():
    examples = [Example(number % 3, f"text {number}") for number in range(50)]
    texts, labels = sample_batch(examples, 20, seed=4)
    assert len(set(texts)) == 20
    assert {Example(*pair) for pair in zip(labels, texts, strict=True)} <= set(examples)
    assert (texts, labels) == sample_batch(examples, 20, seed=4)
    assert texts != sample_batch(examples, 20, seed=5)[0]
    assert sorted(sample_batch(examples, 50, seed=0)[0]) == sorted(example.text for example in examples)


@pytest.mark.parametrize("batch_size", [-1, 0, 3])
def test_impossible_batch_size(batch_size):
    with pytest.raises(DagerError, match=f"batch size {batch_size}"):
        sample_batch([Example(0, "a"), Example(1, "b")], batch_size, seed=0)
