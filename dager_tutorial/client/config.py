"""What a client does in one step: every option, what it is for, and what it may be (chapter `01_gradients_leak`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dager_tutorial.client.constraints import OneOf, Within, check_options, option
from dager_tutorial.errors import DagerError

TASKS = ("classification", "next_token", "masked")
LOSSES = ("cross_entropy", "frobenius")
DTYPES = ("float32", "float64", "bfloat16", "float16")
SHARES = ("all", "attention")
PADDING_SIDES = ("right", "left")


@dataclass(frozen=True)
class ClientConfig:
    """How a client trains in one step of FedSGD, and which gradients it sends.

    The threat model is the honest but curious server: it keeps to the protocol and reads what it is sent. It knows the
    model's weights, the tokenizer, the protocol and the head that it handed out, and receives the gradients of the
    parameters in `share`, summed over the batch. It is told neither texts nor labels, neither
    how many texts there are nor how long they are, and no value of this record: they shape the update and stay with the
    client. The client takes one step, and no secure aggregation hides its update among others. What it does to its
    gradients before it sends them is in `client.defenses`.

    Attributes:
        task: `classification` (the architecture's sequence-classification class with a fresh seeded head),
            `next_token` (its causal language model; mean over all predicted tokens of the batch), or `masked` (its
            masked language model with a fresh seeded head; mean over the masked tokens of the batch). Under `masked`
            the network sees the texts as `masking.masked_inputs` corrupts them, and they are what can be recovered.
        loss: `cross_entropy`, or `frobenius`: the sum of squares of the last hidden state over a text's real tokens,
            mean over the batch, which needs no head. After a final normalisation without trained gain it is nearly
            constant, so that a randomly initialised model gives almost no gradient.
        dtype: `float32`, `float64`, `bfloat16` or `float16`: of forward pass, backward pass and gradients. Where it
            differs from the model's, a converted copy of the weights is made.
        share: `all` parameters, `attention` (weights and biases of every block's query, key, value and output maps), or
            parameter names as the update spells them, `*` standing for anything; a list is kept as a tuple. Other
            gradients are never computed.
        padding_side: `right` or `left`; the gradient is the same up to rounding.
        max_length: Longest text in tokens, special ones included; longer texts are cut. None: no cut.
        seed: Seed of a fresh head, and of the masks.
        head_std: Standard deviation of a fresh head's map to the classes.
        dropout: Probability with which every dropout layer of the network zeroes an entry; 0: evaluation mode.

    Raises:
        DagerError: An option may not have its value.

    Example:
        >>> ClientConfig(share=["score.weight"]).share
        ('score.weight',)
        >>> ClientConfig(task="regression")
        Traceback (most recent call last):
        dager_tutorial.errors.DagerError: task is 'regression': choose one of classification, next_token, masked

    See chapter `01_gradients_leak`.
    """

    task: str = option("classification", OneOf(TASKS), "What the client trains.")
    loss: str = option("cross_entropy", OneOf(LOSSES), "The client's loss.")
    dtype: str = option("float32", OneOf(DTYPES), "The client's precision.")
    share: str | Sequence[str] = option("all", OneOf(SHARES, names=True), "Which parameters' gradients are sent.")
    padding_side: str = option("right", OneOf(PADDING_SIDES), "Where the client pads.")
    max_length: int | None = option(None, Within(1, 2**31 - 1, optional=True), "Tokens to which a text is cut.")
    seed: int = option(0, Within(-(2**63), 2**64 - 1), "Seed of a fresh head and of the masks.")
    head_std: float = option(1e-3, Within(0, whole=False), "Deviation of a fresh head's map to the classes.")
    dropout: float = option(0.0, Within(0, 0.9, whole=False), "Probability of dropout, in training mode.")

    def __post_init__(self) -> None:
        """Freeze a list of names, then check every option."""
        if isinstance(self.share, list):
            object.__setattr__(self, "share", tuple(self.share))
        check_options(self)


def check_fit(config: ClientConfig, architecture: str, *, causal: bool) -> None:
    """Refuse what an architecture cannot do.

    Args:
        config: What is asked.
        architecture: The model's `model_type`, for the message.
        causal: Whether the model is causal, not bidirectional.

    Raises:
        DagerError: A causal model is asked for what only bidirectional ones can do, or the other way round.

    Example:
        >>> check_fit(ClientConfig(task="next_token"), "bert", causal=False)
        Traceback (most recent call last):
        dager_tutorial.errors.DagerError: task 'next_token' needs a causal model and bert is not: use task 'masked'
    """
    if causal and config.task == "masked":
        raise DagerError(
            f"task 'masked' needs a bidirectional model and {architecture} is causal: use task 'next_token'"
        )
    if not causal and config.task == "next_token":
        raise DagerError(f"task 'next_token' needs a causal model and {architecture} is not: use task 'masked'")
    classifies = config.task == "classification" and config.loss == "cross_entropy"
    if not causal and classifies and config.padding_side == "left":
        raise DagerError(
            f"padding_side 'left' needs a causal model: {architecture} classifies by a row's first position, "
            "which would be a pad"
        )
