"""Which images are not trained on, and decide."""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import ArgumentError
from ..inputs.batches import checked

# One image in ten, and at most so many, are not trained on; they show the agreement and decide at the end.
HELD_OUT, MOST_HELD_OUT = 10, 512


def held_out_of(count: int) -> int:
    """Return how many of ``count`` images are held out if no others are given for that."""
    return min(max(count // HELD_OUT, 1), MOST_HELD_OUT)


def hold_out(images: Iterable[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Part images, in the form that `finetune` takes, into those to calibrate and train on and those held out.

    Raises:
        ArgumentError: there are fewer than two, or they are no images.
    """
    items = list(checked(images))
    counts = [len(batch) for batch, _ in items]
    total = sum(counts)
    if total < 2:
        raise ArgumentError(f"fine-tuning needs at least two images, there are {total}")
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: held_out_of(total)]] = True
    masks = chosen.split(counts)
    parts = [[_where(item, mask ^ other) for item, mask in zip(items, masks, strict=True)] for other in (True, False)]
    rest, held = ([item for item, count in part if count] for part in parts)
    return rest, held


def _where(item: tuple[torch.Tensor, torch.Tensor | None], mask: torch.Tensor) -> tuple[Any, int]:
    """Return the part of a batch, labels and all, where the mask `[B]` is set, and how many images that are."""
    return tuple(None if part is None else part[mask.to(part.device)] for part in item), int(mask.sum())
