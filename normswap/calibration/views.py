"""Corrupted copies of calibration images, so that the fit also holds a step beside clean images.

Least squares uses every direction in which the images vary, and leaves all others as they happen to be. Noise, blur and
wrong exposure are such other directions for clean images; with some corrupted copies they are fitted too. Original
and converted model see the same corrupted copy, so the target is what the original makes of it, right or wrong.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..evaluation.corruptions import VIEWS, View, random_views
from ..inputs.batches import FEW, ImageBatches
from ..inputs.normalisation import Normalisation, NormalisationError
from .options import METHODS, SHARE, CalibrationOptions

SEED = 1  # apart from that of the stress rows


def with_views(
    batches: ImageBatches, images: Iterable[Any], model: nn.Module, options: CalibrationOptions
) -> tuple[ImageBatches, float]:
    """Return the batches to calibrate on, and how many corrupted copies they have for each image.

    Args:
        batches: of the images.
        images: as they were given.
        model: the original, whose config may say how they were normalised.
        options: of the calibration; where nothing is said about views, few images and those that are no pixels stay as
            they are.

    Raises:
        NormalisationError: a share is asked for, and the images are no pixels in 0..1 without their normalisation.
    """
    share = options.views
    if share is None:
        share = SHARE if options.method == METHODS[0] and batches.image_count >= FEW else 0.0
    if not share:
        return batches, 0.0
    try:
        more = viewed(batches, Normalisation.of(images, model), share)
        return more, more.image_count / batches.image_count - 1
    except NormalisationError:
        if options.views is not None:
            raise
        return batches, 0.0


def viewed(
    batches: ImageBatches, normalisation: Normalisation, share: float, views: Sequence[View] = VIEWS
) -> ImageBatches:
    """Return batches that end with copies of some of their images, each copy with one random corruption.

    What is learnt from the images themselves so stays, which it would not if corrupted ones took their place.

    Args:
        batches: normalised images, in random order.
        normalisation: leads back to pixels.
        share: copies for each image, 0 to 1; above 0, every batch has one at least.
        views: kinds and strengths to draw from.

    Raises:
        NormalisationError: the images are no pixels in 0..1 once their normalisation is undone.

    >>> batches = ImageBatches([torch.rand(40, 3, 8, 8)], torch.zeros(1))
    >>> some = viewed(batches, Normalisation((0.0,), (1.0,)), share=0.5)
    >>> [len(batch) for batch in batches], [len(batch) for batch in some]
    ([8, 8, 8, 8, 8], [12, 12, 12, 12, 12])
    """
    if not share:
        return batches

    def with_copies(batch: torch.Tensor, start: int) -> torch.Tensor:
        # As many in every batch of one size: each other size is another export.
        pixels = normalisation.pixels(batch)[: max(1, round(share * len(batch)))]
        copies = random_views(pixels, SEED, start, views=views)
        return torch.cat([batch, normalisation.images(copies).to(batch)])

    return batches.mapped(with_copies)
