"""The short check on corrupted images that every conversion makes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..evaluation.stress import brief_stress
from ..inputs.batches import gather
from ..inputs.dataset import ImageSet
from ..progress import Progress
from ..records.stress import StressRecord
from .options import EvaluationOptions

SEED = 0


def shuffled(named: Iterable[Any], source: Iterable[Any], count: int, like: torch.Tensor) -> Iterable[Any]:
    """Return images in no order, labels with them: a folder is read class by class.

    Args:
        named: an `ImageSet`, which draws by itself, or anything else.
        source: the same images as batches, where ``named`` is no `ImageSet`.
        count: how many at most.
        like: what dtype and device they get.
    """
    if isinstance(named, ImageSet):
        return named
    pixels, labels = gather(source, like)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEED))[:count].to(pixels.device)
    return [(pixels[chosen], None if labels is None else labels[chosen])]


def stress_check(
    original: nn.Module,
    converted: nn.Module,
    images: Iterable[Any],
    evaluation: EvaluationOptions,
    progress: Progress,
) -> StressRecord:
    """Return a few rows of `normswap.stress_models` on some of the images; see `EvaluationOptions.stress`."""
    return brief_stress(original, converted, images, evaluation.stress, SEED, evaluation.amp_dtype, progress)
