"""A text made better by what it says of itself: its slopes against the rows of the embedding (chapter `14_defences`).

A token's row of the embedding's gradient is the sum of the slopes at the places where the token stands. The slopes of a
text with wrong tokens are nearly those of the right one, for what the loss wants of each place hardly depends on what
stands there. So the rows of the tokens in question, regressed on the slopes of a text, say which token belongs where;
the matched filter judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.budget import Budget
from dager_tutorial.server.completion.simulation import Ids
from dager_tutorial.server.constants import constants
from dager_tutorial.server.noisy.matched import Matched


class Text(NamedTuple):
    """A text as the matched filter sees it.

    Attributes:
        tokens: Token ids.
        label: Its likeliest class.
        value: S.
        weight: See `matched.Scores`.
    """

    tokens: Ids
    label: int
    value: float
    weight: float


def shares(
    rows: Float[Tensor, "tokens width"],
    slopes: Float[Tensor, "places width"],
    sent: Float[Tensor, "tokens width"] | None = None,
) -> Float[Tensor, "places tokens"]:
    """How much of every token's row the slope at a place makes up: about one number where it stands, 0 elsewhere.

    Args:
        rows: Of the embedding's gradient.
        slopes: Of a text, or of the positions of an update.
        sent: Ones for the rows' entries that were sent, zeros for the others, which are zero; None where all were.

    Example:
        >>> slopes = torch.eye(3, 5)
        >>> shares(slopes[[2, 0]] + slopes[[2, 1]], slopes).round().int()
        tensor([[0, 1],
                [0, 1],
                [2, 0]], dtype=torch.int32)
    """
    rows, slopes = precise(rows), precise(slopes)
    if sent is None:
        gram = slopes @ slopes.T
        ridge = constants().slope_ridge * gram.diagonal().mean()
        return torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), slopes @ rows.T)
    sent = precise(sent)
    grams = (slopes * sent[:, None]) @ slopes.T  # tokens x places x places
    # The fewer entries say anything, the less of what they say may be given away.
    ridges = constants().slope_ridge * sent.mean(1) * grams.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(len(slopes), dtype=grams.dtype, device=grams.device)
    return torch.linalg.solve(grams + ridges[:, None, None] * eye, (rows @ slopes.T)[..., None])[..., 0].T


def likeness(
    rows: Float[Tensor, "tokens width"], slopes: Float[Tensor, "places width"]
) -> Float[Tensor, "places tokens"]:
    """How alike every token's row and a place's slope are at the entries that are known of both, where those are few.

    Args:
        rows: Of the embedding's gradient, zero where nothing is known.
        slopes: Likewise, of the positions of an update.

    Example:
        >>> likeness(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([[0.0, 2.0, 6.0]]))
        tensor([[1., 1.]], dtype=torch.float64)
    """
    rows, slopes = precise(rows), precise(slopes)
    squares = slopes.square() @ (rows != 0).to(rows).T * ((slopes != 0).to(slopes) @ rows.square().T)
    return slopes @ rows.T / squares.sqrt().clamp(min=1e-300)


@dataclass(frozen=True)
class Climb:
    """Replaces tokens of a text as long as the matched filter gains.

    Attributes:
        matched: The filter.
        tokens: int64, the tokens in question.
        budget: What it may cost.
    """

    matched: Matched
    tokens: Int[Tensor, " tokens"]
    budget: Budget

    def best(self, texts: list[Ids]) -> Text:
        """The best of some texts."""
        scores = self.matched.scores(texts)
        best = int(scores.values.argmax())
        numbers = (int(scores.labels[best]), float(scores.values[best]), float(scores.weights[best]))
        return Text(texts[best], *numbers)

    def run(self, text: Text, *, thoroughly: bool = True) -> Text:
        """Climb from a text.

        Args:
            text: Where to begin.
            thoroughly: Whether single tokens are tried, too, where no replacement of the likeliest is better.
        """
        moves = (self._replaced, self.neighbours, self.shorter) if thoroughly else (self._replaced,)
        better: Text | None = text
        while better is not None and not self.budget.late:
            text = better
            better = next(filter(None, (self._better(text, move(text)) for move in moves)), None)
        return text

    def _better(self, text: Text, proposed: list[Ids]) -> Text | None:
        """The best of what is proposed where it is better than a text."""
        found = self.best(proposed) if proposed and not self.budget.late else None
        return found if found is not None and found.value > text.value else None

    def _shares(self, text: Text) -> Tensor:
        rows = self.matched.received[self.matched.words][self.tokens]
        return shares(rows, self.matched.slopes([text.tokens], [text.label])[0])

    def _replaced(self, text: Text) -> list[Ids]:
        """The text with the likeliest token at the places where that is most likely, at more and more of them."""
        found = self._shares(text)
        likeliest = found.max(1)
        own = self.tokens == torch.tensor(text.tokens, device=self.tokens.device)[:, None]
        margin = likeliest.values - torch.where(own, found, 0.0).sum(1)
        order = [place for place in margin.argsort(descending=True).tolist() if margin[place] > 0]
        texts, tokens = [], list(text.tokens)
        for count, place in enumerate(order, 1):
            tokens[place] = int(self.tokens[likeliest.indices[place]])
            if count == len(order) or count & (count - 1) == 0:  # 1, 2, 4, ...
                texts.append(tuple(tokens))
        return texts

    def neighbours(self, text: Text) -> list[Ids]:
        """The text with the likeliest other token at one place, for the places where it is least behind."""
        found = self._shares(text)
        own = self.tokens == torch.tensor(text.tokens, device=self.tokens.device)[:, None]
        others = found.masked_fill(own, -torch.inf).max(1)
        behind = torch.where(own, found, 0.0).sum(1) - others.values
        tokens = text.tokens
        return [
            (*tokens[:place], int(self.tokens[others.indices[place]]), *tokens[place + 1 :])
            for place in behind.argsort().tolist()[: constants().neighbours]
        ]

    def shorter(self, text: Text) -> list[Ids]:
        """The text without its last token."""
        return [text.tokens[:-1]] if len(text.tokens) > 1 else []
