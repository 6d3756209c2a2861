"""The short check on corrupted images that every conversion makes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..evaluation.stress import brief_stress
from ..inputs.batches import checked
from ..inputs.dataset import ImageSet
from ..progress import Progress
from ..records.stress import StressRecord
from .options import EvaluationOptions

SEED = 0


def shuffled(named: Iterable[Any], source: Iterable[Any], total: int, count: int, like: torch.Tensor) -> Iterable[Any]:
    """Return images in no order, labels with them: a folder is read class by class. No others are held.

    Args:
        named: an `ImageSet`, which draws by itself, or anything else.
        source: the same images as batches, where ``named`` is no `ImageSet`.
        total: how many these are.
        count: how many at most.
        like: what dtype and device they get.

    Raises:
        ArgumentError: there are no images.
    """
    if isinstance(named, ImageSet):
        return named
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SEED))[:count].tolist()
    wanted = set(order)
    pixels: dict[int, torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}
    place = 0
    for batch, labels in checked(source):
        for i in range(len(batch)):
            if place + i in wanted:
                pixels[place + i] = batch[i].to(like, copy=True)  # a view would hold its whole batch
                if labels is not None:
                    known[place + i] = labels[i].to(like.device)
        place += len(batch)
    if not pixels:
        raise ArgumentError("there are no images")
    found = [place for place in order if place in pixels]
    # [C, H, W] each -> [B, C, H, W]
    some = torch.stack([pixels[place] for place in found])
    return [(some, torch.stack([known[place] for place in found]) if len(known) == len(pixels) else None)]


def stress_check(
    original: nn.Module,
    converted: nn.Module,
    images: Iterable[Any],
    evaluation: EvaluationOptions,
    progress: Progress,
) -> StressRecord:
    """Return a few rows of `normswap.stress_models` on some of the images; see `EvaluationOptions.stress`."""
    return brief_stress(original, converted, images, evaluation.stress, SEED, evaluation.amp_dtype, progress)
