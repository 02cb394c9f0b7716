"""What each kind of gradient gives alone: the parts are all of the update, and each says what it can say."""

from __future__ import annotations

from collections.abc import Callable

from helpers import every

from dager_tutorial import client_update
from dager_tutorial.evaluation.accuracy import Batch
from dager_tutorial.evaluation.taps import bench_taps, markdown_table, parts_of
from dager_tutorial.models import adapter_for
from dager_tutorial.models.language_model import LanguageModel


@every("tiny_gpt2", "tiny_llama")
def test_each_part_says_what_it_can_and_the_embeddings_are_not_needed(
    model: LanguageModel, random_texts: Callable[..., list[str]]
) -> None:
    batch = Batch("random", 2, random_texts(4, 2), [0, 1, 1, 0])
    runs = {run.shared: run for run in bench_taps(model, [batch])}
    assert (runs["token embedding"].tokens, runs["token embedding"].extra, runs["token embedding"].exact) == (1, 0, 0)
    assert runs["all"].exact == runs["all but embeddings"].exact == runs["query, key, value"].exact == 1
    assert runs["embeddings, attention output"].exact == runs["embeddings, MLP input"].exact == 1
    for kind in ("query, key, value", "attention output", "MLP input"):
        assert runs[kind].true_rows == 1
        assert kind == "query, key, value" or runs[kind].false_rows == 0
    for silent in ("norms", "head", "MLP output"):
        assert (runs[silent].exact, runs[silent].tokens, runs[silent].length) == (0, None, None)
    assert len(markdown_table(list(runs.values())).splitlines()) == 2 + len(runs)


@every("tiny_gpt2", "tiny_llama")
def test_the_parts_cover_the_update(model: LanguageModel) -> None:
    update = client_update(model, ["the river was cold", "my house"])
    parts = parts_of(adapter_for(model.network), update)
    whole = sum(each.numel() for each in update.gradients.values())
    count = {label: sum(each.numel() for each in part.values()) for label, part in parts.items()}
    assert count["head"] + count["all"] == whole
    embeddings = count["token embedding"] + count.get("position embedding", 0)
    assert count["all"] == count["all but embeddings"] + embeddings
