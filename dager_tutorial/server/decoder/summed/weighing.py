"""What the evidence of each tap is worth: logistic regression on a simulated batch (chapter `11_limits`).

Rows of one prefix are not independent from tap to tap, so that their log-odds do not simply add up. Two regressions
learn the weights: one tells true extensions from wrong last tokens, the other from prefixes that went wrong before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from dager_tutorial.models.adapter import DecoderAdapter
from dager_tutorial.models.tap import ATTENTION_OUTPUT, MLP, Tap, precise
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.summed.practice import (
    Examples,
    Inputs,
    Text,
    examples,
    simulated_gradients,
    simulated_texts,
)
from dager_tutorial.server.decoder.summed.spectra import Bands, bands
from dager_tutorial.server.odds import MEDIAN_TO_DEVIATION
from dager_tutorial.server.token_filter import Candidates


@dataclass(frozen=True)
class Scale:
    """What features of false rows usually are.

    Attributes:
        centre: float32, the medians.
        spread: float32, robust standard deviations.
    """

    centre: Float[Tensor, " features"]
    spread: Float[Tensor, " features"]

    @classmethod
    def of(cls, false: Float[Tensor, "rows features"]) -> Scale:
        """The scale of a sample of false rows, of which a few may be anything."""
        centre = false.median(0).values
        spread = MEDIAN_TO_DEVIATION * (false - centre).abs().median(0).values
        return cls(centre, spread.clamp(min=1e-6))

    def deviations(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
        """Deviations in units of the spread; beyond a limit, all say the same."""
        count, most = features.shape[1], constants().largest_deviation
        return ((features - self.centre[:count]) / self.spread[:count]).clamp(-most, most)


@dataclass(frozen=True)
class Weights:
    """A linear rule: log-odds of true against false.

    Attributes:
        factors: float32.
        offset: What is added.
    """

    factors: Float[Tensor, " features"]
    offset: float

    def log_odds(self, deviations: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
        """Log-odds (float32) at equal prior odds."""
        return deviations @ self.factors + self.offset


@dataclass(frozen=True)
class Judges:
    """What was learnt.

    Attributes:
        extension: By the number of features that are known so far, the rule that tells true extensions from wrong ones.
        history: The rule that tells true prefixes from those with an earlier token exchanged.
        screen: The rule for what a sketch of block 0 sees.
    """

    extension: Mapping[int, Weights]
    history: Weights
    screen: Weights


def logistic(true: Float[Tensor, "true features"], false: Float[Tensor, "false features"]) -> Weights:
    """Logistic regression with a ridge, both classes counting the same.

    Args:
        true: Deviations of true rows.
        false: Deviations of false ones.
    """
    rows = precise(torch.cat([true, false]))
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    labels = torch.cat([torch.ones(len(true)), torch.zeros(len(false))]).to(rows)
    counts = torch.where(labels > 0, len(rows) / 2 / max(1, len(true)), len(rows) / 2 / max(1, len(false)))
    ridge = torch.full_like(rows[0], constants().logistic_ridge).diag()
    ridge[-1, -1] = 1e-6
    weights = torch.zeros_like(rows[0])
    for _ in range(constants().logistic_steps):
        odds = (rows @ weights).sigmoid()
        slope = rows.T @ (counts * (odds - labels)) + ridge @ weights
        curvature = (rows.T * (counts * odds * (1 - odds))) @ rows + ridge
        weights = weights - torch.linalg.solve(curvature, slope)
    return Weights(weights[:-1].float(), float(weights[-1]))


def judges(
    adapter: DecoderAdapter,
    candidates: Candidates,
    taps: Sequence[Tap],
    stages: Sequence[int],
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    ends: bool,
) -> Judges:
    """Learn from a simulated batch.

    Args:
        adapter: The architecture.
        candidates: Tokens that may stand at each position.
        taps: The taps whose evidence is summed.
        stages: After how many taps extensions are judged.
        size: How many texts the batch has, and about how many rows.
        generator: Source of randomness, on the CPU.
        ends: Whether the loss reads each text's last token only.
    """
    lessons = _lessons(adapter, candidates, taps, size, generator, ends=ends)
    each = lessons[0][0].shape[1] // len(taps)
    true, wrong, copies = (torch.cat(parts) for parts in zip(*(lesson[:3] for lesson in lessons), strict=True))
    quick = [torch.cat(parts) for parts in zip(*(lesson[3:] for lesson in lessons), strict=True)]
    extension = {each * count: logistic(true[:, : each * count], wrong[:, : each * count]) for count in stages}
    return Judges(extension, logistic(true, copies), logistic(*quick))


def _lessons(
    adapter: DecoderAdapter,
    candidates: Candidates,
    taps: Sequence[Tap],
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    ends: bool,
) -> list[tuple[Tensor, ...]]:
    """Deviations of true rows, wrong ones and copies, and of the first two as a sketch sees them, batch by batch."""
    lessons: list[tuple[Tensor, ...]] = []
    while not lessons or sum(len(lesson[0]) for lesson in lessons) < constants().example_rows:
        texts = simulated_texts(candidates, *size, generator)
        gradients = simulated_gradients(adapter, texts, taps, generator, ends=ends)
        seen = examples(adapter, _some(texts), candidates, taps, generator)
        features = _features(seen, gradients, taps)
        quick = _deviations(seen, tuple(screened(part, taps) for part in features))
        lessons.append((*_deviations(seen, features), *quick[:2]))
    return lessons


def _some(texts: Sequence[Text]) -> Sequence[Text]:
    """As many texts as have rows enough."""
    ends = list(accumulate(map(len, texts)))
    return texts[: 1 + bisect_left(ends, constants().example_rows)]


def screened(features: Float[Tensor, "rows features"], taps: Sequence[Tap]) -> Float[Tensor, "rows screened"]:
    """What a sketch of block 0 would see of the features: the weakest bands, and all the others as one."""
    each = features.shape[1] // len(taps)
    parts = []
    for index, tap in enumerate(taps):
        if tap.block == 0 and tap.kind in (ATTENTION_OUTPUT, MLP):
            own = features[:, index * each : (index + 1) * each]
            kept = own[:, : constants().screened_bands]
            parts += [kept, own[:, constants().screened_bands :].logsumexp(1, keepdim=True)]
    return torch.cat([features[:, :0], *parts], 1)


def _features(seen: Examples, gradients: Mapping[str, Tensor], taps: Sequence[Tap]) -> tuple[Tensor, ...]:
    """Log-shares at all taps, of true rows, wrong ones and copies."""
    parts: list[list[Tensor]] = [[], [], []]
    for tap in taps:
        gradient = tap.gradient(gradients)
        assert gradient is not None
        spectrum = bands(gradient)
        for part, inputs in zip(parts, (seen.true, seen.wrong, seen.copies), strict=True):
            part.append(_log_shares(spectrum, inputs, tap))
    return tuple(torch.cat(part, 1) for part in parts)


def _deviations(seen: Examples, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Deviations of all rows from the wrong ones at about the same position."""
    where = [_octave(inputs.positions, seen.wrong.positions) for inputs in (seen.true, seen.wrong, seen.copies)]
    found = tuple(torch.zeros_like(part) for part in features)
    for octave in where[1].unique():
        scale = Scale.of(features[1][where[1] == octave])
        for part, own, place in zip(found, features, where, strict=True):
            part[place == octave] = scale.deviations(own[place == octave])
    return found


def _octave(positions: Tensor, counted: Tensor) -> Tensor:
    """0 for the first position, 1 for the next two, 2 for the next four, ..., no more than have rows to count."""
    octaves = (counted + 1).double().log2().long()
    full = [index for index in octaves.unique().tolist() if int((octaves == index).sum()) >= constants().fewest_usual]
    return (positions + 1).double().log2().long().clamp(max=max(full, default=0))


def _log_shares(spectrum: Bands, inputs: Inputs, tap: Tap) -> Tensor:
    return spectrum.log_shares(inputs.vectors[tap].float())
