"""What is recorded of an image that a conversion changed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One class of an answer.

    Attributes:
        index: of the class.
        name: of the class; its index as text, where no name is known.
        percent: softmax probability.
    """

    index: int
    name: str
    percent: float


@dataclass(frozen=True)
class WorstImage:
    """One image on which the converted model is far from the original.

    Attributes:
        position: in the order of evaluation, from 0.
        name: of its file, or "image 17".
        kl: KL(original || converted) of the softmax, in nats; infinite if an output is not finite.
        label: name of its class; None without labels.
        original, converted: the likeliest answers, best first; empty if an output is not finite.
    """

    position: int
    name: str
    kl: float
    label: str | None
    original: list[Answer]
    converted: list[Answer]
