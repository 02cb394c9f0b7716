"""What was recovered, text by text, and beside the owner's texts. Where texts are hidden, no record holds any."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dager_tutorial.client.batch import Truth
from dager_tutorial.errors import DagerError
from dager_tutorial.evaluation import metrics
from dager_tutorial.models.language_model import LanguageModel, frame_ids
from dager_tutorial.reconstruction import Reconstruction
from dager_tutorial.status import Status


@dataclass(frozen=True)
class FoundText:
    """One recovered text.

    Attributes:
        tokens: How many tokens it has, those that frame it left out.
        certainty: By what it is confirmed: `whole`, `rows`, `guess`, or `-` where nobody says.
        proven: Whether it is certain.
        copies: How often it stands in the batch; None unless that is certified.
        labelled: Whether its label was recovered, too, and is certified.
        ratio: Its residual ratio, about 1 where it is true; None where it is not finite.
        labels: Its labels; None where texts are hidden.
        text: The text; None where texts are hidden.
    """

    tokens: int
    certainty: str
    proven: bool
    copies: int | None
    labelled: bool
    ratio: float | None
    labels: tuple[int, ...] | None
    text: str | None


@dataclass(frozen=True)
class OwnText:
    """One of the owner's texts and what came back of it.

    Attributes:
        tokens: How many tokens it has, those that frame it left out.
        exact: Whether it came back token by token.
        share: ROUGE-1 of the text that is most like it: how much of it came back.
        text: The text; None where texts are hidden.
        recovered: What came back; None where texts are hidden.
    """

    tokens: int
    exact: bool
    share: float
    text: str | None
    recovered: str | None


@dataclass(frozen=True)
class Compared:
    """The owner's texts beside what was recovered. The attack saw nothing of them.

    Attributes:
        texts: How many there are.
        exact: How many came back token by token.
        tokens: How many tokens the client trained on.
        token_accuracy: Share of the tokens that stand at the right place.
        rouge1: Mean of ROUGE-1.
        rouge2: Mean of ROUGE-2.
        rouge_l: Mean of ROUGE-L.
        own: Text by text.
    """

    texts: int
    exact: int
    tokens: int
    token_accuracy: float
    rouge1: float
    rouge2: float
    rouge_l: float
    own: tuple[OwnText, ...]


def found_texts(model: LanguageModel, found: Reconstruction, *, show_texts: bool = False) -> tuple[FoundText, ...]:
    """The recovered texts: the proven ones first, the longer ones first.

    Args:
        model: The model both sides know.
        found: What the attack found.
        show_texts: Whether the record holds texts and labels.
    """
    frame, certain = frame_ids(model.tokenizer), set(found.confirmed)
    weighed, lines = found.status is Status.CERTIFIED, []
    for place, ids in enumerate(found.sequences):
        labels = found.labels[place] if found.labels and weighed else ()
        line = FoundText(
            tokens=sum(token not in frame for token in ids),
            certainty=found.confirmations[place].certainty.value if found.confirmations else "-",
            proven=ids in certain,
            copies=found.copies[place] if found.copies and weighed else None,
            labelled=bool(labels),
            ratio=_finite(found.scores[place]),
            labels=labels if show_texts else None,
            text=found.texts[place] if show_texts else None,
        )
        lines.append(line)
    return tuple(sorted(lines, key=lambda line: (not line.proven, line.certainty == "guess", -line.tokens)))


def _finite(ratio: float) -> float | None:
    return round(ratio, 3) if abs(ratio) < 1e30 else None


def compared(found: Reconstruction, truth: Truth, *, show_texts: bool = False) -> Compared:
    """Put the owner's texts beside what was recovered.

    Args:
        found: What the attack found.
        truth: What the owner knows.
        show_texts: Whether the record holds texts.

    Raises:
        DagerError: Nothing in the owner's texts could be recovered by anyone.
    """
    points = metrics.score(found, truth)
    own = tuple(_own(found, truth, place, pair, show_texts) for place, pair in enumerate(points.pairs))
    return Compared(
        texts=points.batch_size,
        exact=sum(one.exact for one in own),
        tokens=points.n_tokens,
        token_accuracy=points.token_accuracy,
        rouge1=points.rouge1,
        rouge2=points.rouge2,
        rouge_l=points.rougeL,
        own=own,
    )


def _own(found: Reconstruction, truth: Truth, place: int, pair: metrics.Pair, show_texts: bool) -> OwnText:
    own = slice(place, place + 1)
    fields = ("texts", "labels", "sequences", "wholes")
    alone = replace(truth, **{name: getattr(truth, name)[own] for name in fields})
    try:
        share = metrics.score(found, alone).rouge1
    except DagerError:  # of a text of one token that is only a target there is nothing to recover
        share = 0.0
    return OwnText(
        tokens=sum(token not in truth.frame for token in truth.wholes[place]),
        exact=pair.exact,
        share=share,
        text=pair.text if show_texts else None,
        recovered=pair.recovered if show_texts else None,
    )
