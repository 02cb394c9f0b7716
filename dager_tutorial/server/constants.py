"""Every number in the attack that is not read off the update: what it is, where it comes from, what it is for.

None of them is an option, and all are the same for every model, batch and precision. `dager bench sensitivity` halves
and doubles each in turn and reports what changes; `docs/sensitivity.md` holds the table that it wrote.
Chapter `11_limits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any


def _constant(value: Any, meaning: str, origin: str) -> Any:
    return field(default=value, metadata={"meaning": meaning, "origin": origin})


@dataclass(frozen=True)
class Constants:
    """The numbers, by name. Read them through `constants()`, which `varied` can change for a while."""

    # Span: rank, noise, and the test of membership (chapter `04_noise`)
    miss_rate: float = _constant(1e-6, "share of true rows that a span test rejects by noise alone", "chosen")
    model_error: float = _constant(
        4.0, "a true row's residual may be so many times the predicted one", "measured: z of true rows 0.8 to 1.5"
    )
    clear_gap: float = _constant(
        30.0, "ratio of neighbouring singular values that noise does not make", "measured: gaps of signals 1e3 to 1e6"
    )
    nearly_full: float = _constant(0.9, "share of the width above which a rank without a gap is full", "measured")
    uneven_rounding: float = _constant(
        100.0, "noise over the floor of storage above which it is measured for each output", "measured"
    )
    largest_rounding: float = _constant(
        1000.0, "largest rounding errors of a gradient's sums over those of storing it", "measured: random BERT-base"
    )
    storage_rounding: float = _constant(
        0.2, "root mean square of rounding to nearest, in units of epsilon and of the entry", "numerics: 0.2 to 0.29"
    )
    projection_error: float = _constant(2.0**-23, "relative error of projecting in float32", "numerics: epsilon")
    sketch: int = _constant(32, "directions of the first sketch that looks for the signal", "cost")
    growth: int = _constant(2, "factor by which a sketch grows while signal shows at its end", "cost")
    largest_sketch: float = _constant(0.5, "share of the width above which all is decomposed at once", "cost")
    oversampling: int = _constant(12, "noise directions that a sketch must show behind the signal", "numerics")
    noise_probes: int = _constant(32, "random probes that measure the noise behind a sketch", "statistics")
    leverage_shift: float = _constant(
        12.0, "largest shift of a true row's log-leverage, in deviations of false ones", "measured: 2 to 12"
    )
    # Rounding of hidden states
    probe_texts: int = _constant(8, "random texts on which the rounding of hidden states is measured", "cost")
    probe_length: int = _constant(4, "tokens of each of them", "cost")
    probe_blocks: int = _constant(2, "blocks measured; deeper ones grow with the root of the depth", "measured")
    null_texts: int = _constant(16, "random texts whose rows say what log-leverages false rows have", "statistics")
    null_length: int = _constant(16, "tokens of each of them", "statistics")
    # Missing entries (chapter `11_limits`)
    fewest_absent: float = _constant(
        0.02, "share of zeros inside the maps' gradients above which they were taken out", "numerics: below 1e-5 else"
    )
    held_out: float = _constant(0.02, "share of the entries that test what was filled in", "statistics")
    filling_seed: int = _constant(1_414_213_562, "seed of that choice, which nobody else takes", "chosen")
    filled: float = _constant(1e-6, "share of the entries that a filled gradient may leave", "numerics: float32 sums")
    filling_error: float = _constant(1e-3, "share of held-out entries that it may miss them by", "chosen")
    entries_a_number: float = _constant(1.2, "entries for each number of a low-rank matrix", "measured: 1.1 fails")
    entries_a_direction: float = _constant(2.0, "entries of a row for each of its coefficients", "measured: 1.3 fails")
    filling_pays: float = _constant(0.95, "share to which a round must lower the rest, or the rank grows", "cost")
    filling_gap: float = _constant(3.0, "ratio of neighbouring directions at which a rank may end", "measured")
    polishing_pays: float = _constant(0.99, "the same where the rank may be the right one", "cost")
    filling_rounds: int = _constant(300, "rounds at one rank", "cost")
    filling_ridge: float = _constant(1e-13, "what keeps each row's equations solvable, relative", "numerics")
    most_bits: int = _constant(10, "bits that a level of a grid has at most", "chosen")
    grid_precision: float = _constant(1e-3, "what stands for machine epsilon where a grid rounds", "measured")
    off_grid: float = _constant(1e-2, "how far from its level a number may lie, in steps", "numerics: float32")
    rounding_deviations: float = _constant(
        6.0, "deviations by which rounding at random may differ from its expected sum of squares", "statistics"
    )
    # Dropout (chapter `11_limits`)
    masked_outside: float = _constant(3.0, "rates that a masked sum may leave outside the span", "measured: 0.7 to 1.2")
    absolute_rounds: int = _constant(40, "rounds of reweighting for least absolute deviations", "numerics")
    found_before: float = _constant(3.0, "cost of coordinates at which masks of the same sum were found", "chosen")
    dropped_outside: float = _constant(1e-8, "squared share that rounding leaves of masked attention", "measured")
    telling_weight: float = _constant(3e-3, "attention weight below which a mask does not show", "numerics")
    same_weight: float = _constant(0.02, "how far from one a weight that was kept may be", "numerics")
    kept_weights: float = _constant(
        0.5, "share of the weights that a mask must leave as they are", "measured: true .7 to 1, false below .45"
    )
    quiet_row: float = _constant(1e-4, "size of an embedding's row over the largest below which it is none", "chosen")
    masked_rounding: float = _constant(
        1e-6, "share of a usual entry of the embedding gradient below which a mask made it zero", "numerics"
    )
    # Token filter (chapter `05_token_filter`)
    random_pairs: int = _constant(512, "random tokens at random places that tell what block 0's span is worth", "cost")
    random_held: float = _constant(
        0.5, "share of them that pass, of a weight difference, above which it tells no token", "measured: .92 or < .05"
    )
    filter_directions: int = _constant(64, "random directions of the complement that screen all pairs", "cost")
    filter_positions: int = _constant(32, "positions that are screened in one product", "cost")
    filter_pairs: int = _constant(8192, "pairs that are tested exactly at once", "cost")
    row_rounding: float = _constant(1e-4, "share of a usual row of an embedding that is rounding", "numerics")
    fewest_entries: int = _constant(8, "entries not zero of an embedding's row, lest others were lost", "statistics")
    # Weight differences (chapter `11_limits`)
    drift_length: int = _constant(12, "tokens of each random text on which drift is measured", "cost")
    drift_share: float = _constant(
        0.25, "share of the drift by which vectors halfway differ from those of the steps", "measured: exact at 1e-3"
    )
    lost_in_rounding: float = _constant(0.5, "share of entries that did not move, from which rounding hides", "chosen")
    even_sizes: float = _constant(
        0.95, "squared mean over mean square of sizes from which all are the same, as in a step of Adam", "chosen"
    )
    # Decoder search (chapters `06_decoder_recovery` and `11_limits`)
    search_directions: int = _constant(32, "random directions that screen extensions of prefixes", "cost")
    screen_slack: float = _constant(2.0, "screened residuals may exceed the bound by so much", "statistics")
    longest_repeat: int = _constant(512, "how far a repeated first token is followed while rows are missing", "cost")
    longest_repeat_in_noise: int = _constant(16, "the same where noise hides how many rows there are", "cost")
    tokens_at_once: int = _constant(512, "tokens that go through the whole network at once", "cost")
    false_alarms: float = _constant(0.01, "extensions that chance alone may keep at one position", "chosen")
    widest: int = _constant(128, "prefixes of one length that a search by leverage keeps at most", "cost")
    # Decoder search by summed evidence (chapter `11_limits`)
    largest_deviation: float = _constant(6.0, "deviations beyond which a tap's evidence says no more", "measured")
    logistic_ridge: float = _constant(10.0, "ridge of the regression that weighs the evidence of taps", "measured")
    logistic_steps: int = _constant(25, "steps of Newton's method in that regression", "cost")
    example_rows: int = _constant(800, "rows of simulated batches that the regression sees, at least", "statistics")
    fewest_usual: int = _constant(32, "false rows that tell what is usual at some positions", "statistics")
    patience: int = _constant(16, "positions that a search goes on behind the last end that it found", "chosen")
    bands: int = _constant(8, "bands of a spectrum, each twice as wide as the one before", "measured")
    screened_bands: int = _constant(5, "bands that a sketch of block 0 sees one by one", "cost")
    sketch_lengths: int = _constant(64, "random directions that estimate a length in that sketch", "cost")
    usual_sample: int = _constant(144, "extensions that tell which log-leverages are usual at a position", "statistics")
    usual_for: float = _constant(1.2, "factor in length within which the same log-leverages are usual", "cost")
    screened: int = _constant(128, "extensions for each prefix that the sketch lets through", "cost")
    fewest_prefixes: int = _constant(16, "prefixes that a front counts as, at least", "cost")
    through_attention: int = _constant(32, "extensions for each prefix that go on behind block 0's attention", "cost")
    through_block: int = _constant(10, "the same behind block 0", "cost")
    through_blocks: int = _constant(4, "the same behind block 2", "cost")
    simulated_texts: int = _constant(32, "texts of a simulated batch where nothing tells how many there are", "chosen")
    usual_length: float = _constant(0.4, "a usual text's length over that of the batch's longest", "measured: reviews")
    simulated_rows: float = _constant(1.2, "rows of a simulated batch over the width, at least", "chosen")
    doubtful_odds: float = _constant(4.0, "log-odds below zero down to which an extension may be doubtful", "measured")
    least_odds: float = _constant(2.5, "log-odds below which a prefix is given up", "measured")
    # Decoder search where the weights moved on the way
    ranked_sample: int = _constant(192, "random extensions that tell how badly false ones fit", "statistics")
    familiar_rows: int = _constant(4096, "rows that tell how well tokens fit behind any prefix, at most", "cost")
    anyway: float = _constant(0.5, "share of how a token fits behind any prefix that is no evidence", "measured")
    ranked: int = _constant(24, "extensions of each prefix that are carried through block 0's MLP", "cost")
    glances: int = _constant(12, "times as many pass a glance at its input where two blocks rank", "cost")
    ranked_deep: int = _constant(32, "the same through block 1's MLP", "cost")
    ranked_first: int = _constant(1024, "first tokens that are carried through them", "cost")
    ranked_blocks: int = _constant(2, "blocks whose taps rank extensions", "cost")
    garbage: float = _constant(0.05, "chance that a text's end is followed by a token that only seems to fit", "chosen")
    beside_best: float = _constant(0.5, "share of the best sibling's evidence that another one needs", "measured")
    beside_second: float = _constant(0.4, "the same of a second token: several texts may begin alike", "measured: .46")
    beside_others: float = _constant(0.25, "share of other texts' usual evidence that a text needs", "chosen")
    beginning: int = _constant(4, "first tokens by which beams are told apart", "chosen")
    first_tokens: int = _constant(2, "first tokens by which they are until then", "chosen")
    rivals: int = _constant(5, "prefixes of a beginning that go on at most, its best among them", "cost")
    behind: float = _constant(0.6, "usual rows by which they may lie behind it", "chosen")
    rivals_left: int = _constant(10, "the same where others were told and few are left", "cost")
    behind_left: float = _constant(1.0, "usual rows by which they may lie behind it then", "chosen")
    beam: int = _constant(3, "prefixes that each first token keeps until its beginnings are told apart", "cost")
    widest_beam: int = _constant(8, "prefixes that each first token keeps at most", "cost")
    weak_rows: int = _constant(2, "more rows that do not stand out than do before a beam is given up", "chosen")
    again: float = _constant(0.3, "what evidence counts of a row whose last three tokens the text had before", "chosen")
    weak_text: float = _constant(0.3, "share of told texts' mean evidence below which a string is no text", "measured")
    alike: int = _constant(4, "last tokens by which a prefix is known as a copy of a better one", "chosen")
    ending: float = _constant(0.4, "share of a text's usual evidence below which its last rows are none", "chosen")
    far_better: float = _constant(1.8, "times a text's evidence that one has which rules it out early", "measured: 2.5")
    unended: float = _constant(0.5, "what the evidence of a text counts whose end was not seen", "chosen")
    seen_misfit: float = _constant(0.9, "most by which, as a logarithm, a text's end misfits", "measured: .93, else 1")
    end_misfit: float = _constant(0.8, "the same of a text that is told to be whole", "measured: .64, else 1")
    end_beside: float = _constant(0.5, "and by how much more than those of other texts", "measured: true .43, else .53")
    no_end: float = _constant(1.1, "by how much, as a logarithm, a prefix misfits that is no text's end", "measured")
    seen_share: float = _constant(0.6, "share of the way there from a usual end where ends lie", "measured: .5, .77")
    end_margin: float = _constant(0.23, "by how much, as a logarithm, prefixes of a text fit worse", "measured")
    ends_every: int = _constant(8, "positions after which ends are looked for", "cost")
    end_ridge: float = _constant(0.03, "ridge of the slopes at known ends, share of a square", "measured")
    mended: float = _constant(0.02, "least by which, as a logarithm, a neighbour fits better", "chosen")
    mended_rows: float = _constant(0.5, "usual rows' evidence that a neighbour gains which fits as well", "chosen")
    mended_places: float = _constant(0.5, "share of earlier rows' evidence below which one is edited", "measured: .43")
    mended_before: int = _constant(8, "earlier rows that it is compared with", "chosen")
    mended_tokens: int = _constant(12, "tokens that are tried at each place", "cost")
    mended_behind: int = _constant(3, "tokens behind it whose rows are compared", "cost")
    mended_tried: int = _constant(8, "neighbours of a text that the last block is asked of", "cost")
    mended_everywhere: int = _constant(32, "the same where no row needs to fall", "cost")
    mended_longer: float = _constant(0.25, "share of those neighbours that go on behind its end", "chosen")
    mended_steps: int = _constant(8, "tokens of a text that are changed at most", "cost")
    mended_blind: int = _constant(2, "the same where no end is seen", "cost")
    mended_thoroughly: int = _constant(4, "texts that are mended where no row falls, too: the worst ones", "cost")
    mended_weakest: int = _constant(6, "places of such a text, those with the weakest rows", "cost")
    missing: int = _constant(5, "tokens in a row that a text may leave out", "cost")
    missing_beam: int = _constant(12, "strings of one length that are followed at a place", "cost")
    missing_places: int = _constant(2, "places of a text where they are sought", "cost")
    unheld: float = _constant(2.0, "evidence more of a token that stands somewhere, and in no text", "chosen")
    left_over: float = _constant(0.15, "share that known texts leave of the row of a token of others", "measured")
    common: int = _constant(2, "known texts that hold a token which others may hold, too", "measured")
    beyond_drift: float = _constant(2.0, "times what known texts leave of most of their rows that is more", "measured")
    most_drifted: float = _constant(0.35, "the same above which rows tell nothing", "chosen")
    most_left_over: float = _constant(0.7, "share of the tokens above which the others help little", "chosen")
    own_rows: float = _constant(2.0, "outstanding rows that a text needs which no better text has", "chosen")
    own_share: float = _constant(0.4, "and the share of its evidence that they are", "chosen")
    # Decoder search where an adapter is narrower than its text is long
    whitening_texts: int = _constant(128, "random texts that tell which directions rows share anyway", "statistics")
    whitening_ridge: float = _constant(0.02, "share of the mean variance that every direction has at least", "numerics")
    narrow_tokens: int = _constant(2048, "tokens for each position that may begin to explain an adapter", "cost")
    narrow_screened: int = _constant(64, "extensions of each prefix that go on behind block 0's first tap", "cost")
    narrow_beam: int = _constant(32, "prefixes of one length that are kept", "cost")
    rows_a_direction: int = _constant(8, "rows for each direction of a tap up to which a text is followed", "cost")
    nothing_new: float = _constant(1e-4, "share of a row that rounding may leave outside earlier ones", "numerics")
    # Completion
    tokens_trained_at_once: int = _constant(128, "tokens for which the client's step is repeated at once", "cost")
    most_copies: int = _constant(8, "copies of one text, and texts for each distinct one, that are tried", "cost")
    finest_count: float = _constant(1e-5, "error of a count that is tried first", "measured: 1e-7 to 1e-5")
    coarser: float = _constant(6.0, "factor from one error of a count to the next that is tried", "chosen")
    coarsest_count: float = _constant(0.08, "error above which no count is tried", "chosen")
    rounded: float = _constant(4.0, "share of an update that 16 bits may leave, in units of their epsilon", "measured")
    chance_counts: float = _constant(0.05, "chance that numbers which mean nothing are taken for counts", "chosen")
    certified: float = _constant(1e-5, "share of an update that a reconstruction may leave unexplained", "measured")
    target_noise: float = _constant(30.0, "a row's gradient may be off by so many expected errors", "measured: 2 to 13")
    target_rounding: float = _constant(32.0, "and by so much of itself, in units of epsilon", "measured: 3 to 17")
    endings_tried: int = _constant(16, "tokens whose slopes are computed for what is left of a row", "cost")
    rows_compared_at_once: int = _constant(64, "rows that are compared with the whole vocabulary at once", "cost")
    most_endings: int = _constant(32, "tokens that are added to those known to follow a prefix", "cost")
    unseen: float = _constant(1e-10, "share of the strongest below which no text moves a direction", "numerics")
    most_conjugate: int = _constant(200, "most steps of conjugate gradients for an unknown head", "cost")
    tellers: int = _constant(4, "texts, or copies of one, with which the search for an unknown head begins", "chosen")
    newton_steps: int = _constant(12, "steps of Newton's method for scale and offset of an unknown head", "numerics")
    # Gaussian noise
    uneven_noise: float = _constant(1.1, "factor by which silent rows may scatter unlike white noise", "statistics")
    slope_ridge: float = _constant(0.01, "ridge of the regression of rows on slopes, share of a square", "measured")
    idle_rounds: int = _constant(6, "rounds after which tokens that move as many as before are left", "cost")
    even_weights: float = _constant(0.1, "share by which weights of one batch's texts may seem uneven", "chosen")
    outstanding: float = _constant(8.0, "deviations of the matched filter below which a text is none", "statistics")
    weakest_end: float = _constant(0.3, "share of the usual weight that a text has by its end alone", "measured: .1")
    endings: int = _constant(8, "places at which a text may end that are tried at once", "cost")
    weakest_text: float = _constant(0.2, "share of the strongest text's S that every other one has", "chosen")
    apart: float = _constant(6.0, "deviations by which a text fits better than its neighbours", "chosen")
    neighbours: int = _constant(8, "places of a text at which its likeliest other token is tried", "cost")
    starts: int = _constant(16, "beginnings of texts that are weighed again after each text that was found", "cost")
    # Unmixing and incidence (chapters `07_unmixing` and `08_encoder_recovery`)
    ridge: float = _constant(1e-3, "ridge of positions regressed on tokens, share of a square", "numerics")
    weakest: float = _constant(1e-3, "share of a head's mean variance below which directions count less", "numerics")
    once: float = _constant(0.8, "largest coefficient from which a token stands at one position only", "measured")
    coefficient_noise: float = _constant(2.0, "deviations from zero at which a token may stand elsewhere", "statistics")
    fewest_apart: int = _constant(20, "pairs known to be in different texts that calibrate the likeness", "statistics")
    # Encoder search (chapter `08_encoder_recovery`)
    equations: int = _constant(480, "equations of a quick relaxation", "measured")
    most_equations: int = _constant(1440, "equations of a thorough one", "cost")
    fewest_equations: int = _constant(240, "equations below which a relaxation is not tried", "measured")
    queries: int = _constant(16, "known tokens whose attention is asked", "cost")
    settled_weight: float = _constant(0.9, "weight above which a position is known in the next round", "measured")
    growth_rounds: int = _constant(3, "rounds in which a text grows around what is known", "cost")
    polish_directions: int = _constant(48, "random directions in which the polish measures", "cost")
    sweeps: int = _constant(3, "passes of the polish over a text", "cost")
    loyal: float = _constant(
        0.66, "share of a token's mates that must be mates of each other, lest it stand in two texts", "measured"
    )
    short_text: int = _constant(8, "length up to which a text is cut out of the weights at every length", "measured")
    failures: int = _constant(40, "seeds in a row without a text before the search gives up", "cost")
    stalled: int = _constant(2, "the same where found texts can be taken off the update instead", "cost")
    full_failures: int = _constant(20, "the same where all directions are full and a seed costs more", "cost")
    cuts: int = _constant(2, "lengths at which a text is tried where all directions are full", "cost")
    taken_off: float = _constant(
        0.125, "found rows, in shares of the width, that are taken off a full update before more are sought", "cost"
    )
    # Interior point (chapter `08_encoder_recovery`)
    iterations: int = _constant(40, "most iterations of the interior-point method", "cost: 15 to 20 are used")
    solved: float = _constant(3e-6, "residual at which the equations are solved to rounding", "numerics")
    light_residual: float = _constant(1e-2, "residual above which float32 has digits enough", "numerics")
    spent: float = _constant(1e-13, "barrier at which no digits are left to gain", "numerics")
    constraint_weight: float = _constant(3.0, "weight of the constraints' rows against the equations'", "numerics")
    dead_weight: float = _constant(2e-4, "weight below which a candidate is dropped", "numerics")
    settling: int = _constant(4, "iterations before candidates are dropped", "measured")


_ACTIVE: ContextVar[Constants] = ContextVar("constants", default=Constants())  # noqa: B039 (frozen)


def constants() -> Constants:
    """The numbers in force."""
    return _ACTIVE.get()


@contextmanager
def varied(**values: Any) -> Iterator[None]:
    """Put other numbers in force while the block runs, for experiments.

    Args:
        values: New values by the names of `Constants`.

    >>> with varied(clear_gap=60.0):
    ...     print(constants().clear_gap)
    60.0
    """
    token = _ACTIVE.set(replace(constants(), **values))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
