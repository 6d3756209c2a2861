"""How far a student is from its teacher: in its answers, and in the residual stream in front of every norm."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..evaluation.evaluate import kl_divergence


def distance(output: torch.Tensor, answer: torch.Tensor, logits: bool) -> torch.Tensor:
    """Return for every image `[B]` the KL of the softmax, in nats; for features the relative squared error."""
    if logits:
        return kl_divergence(output, answer)
    error, size = (output - answer).flatten(1), answer.flatten(1)  # [B, ...] -> [B, K]
    return error.square().mean(1) / size.var().clamp(min=torch.finfo(size.dtype).tiny)


def gain_of(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Return how much closer images came on average, `[B]` and `[B]`, and the standard error of that.

    Both are measured on the same images, so it is the differences that spread, not the distances.
    """
    gain = before - after
    return float(gain.mean()), float(gain.std(correction=0)) / math.sqrt(len(gain))


def hints(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over places of the squared error of a stream, relative to its variance."""
    errors = []
    for x, y in zip(found, wanted, strict=True):
        x, y = x.float(), y.float()
        errors.append((x - y).square().mean() / y.var().clamp(min=torch.finfo(y.dtype).tiny))
    return torch.stack(errors).mean()


@contextmanager
def taps(model: nn.Module, paths: Sequence[str]) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of the modules at ``paths``, in the order in which they run."""
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handles = [model.get_submodule(path).register_forward_pre_hook(hook) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
