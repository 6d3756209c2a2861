"""How far a student is from its teacher: in its answers, and in the residual stream in front of every norm."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def is_classifier(output: torch.Tensor) -> bool:
    """Return whether an output `[B, K]` is logits of two classes or more."""
    return output.ndim == 2 and output.shape[1] > 1


def distance(output: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Return for every image `[B]` the KL of the softmax, in nats; for other outputs the relative squared error."""
    if is_classifier(output):
        return F.kl_div(output.log_softmax(1), answer.log_softmax(1), reduction="none", log_target=True).sum(1)
    error, size = (output - answer).flatten(1), answer.flatten(1)  # [B, ...] -> [B, K]
    return error.square().mean(1) / size.var().clamp(min=torch.finfo(size.dtype).tiny)


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
