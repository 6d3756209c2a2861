"""Calibration images of which some are corrupted, so that the fit also holds a step beside clean images.

Least squares uses every direction in which the images vary, and leaves all others as they happen to be. Noise, blur and
wrong exposure are such other directions for clean images; with a share of corrupted ones they are fitted too. Original
and converted model see the same corrupted image, so the target is what the original makes of it, right or wrong.
"""

from collections.abc import Sequence

import torch

from ..evaluation.corruptions import VIEWS, View, random_views
from ..inputs.batches import ImageBatches
from ..inputs.normalisation import Normalisation

SEED = 1  # apart from that of the stress rows


def viewed(
    batches: ImageBatches, normalisation: Normalisation, share: float, views: Sequence[View] = VIEWS
) -> ImageBatches:
    """Return the same images, about a share of them with one random corruption each.

    Args:
        batches: normalised images.
        normalisation: leads back to pixels.
        share: how likely an image is corrupted, 0 to 1.
        views: kinds and strengths to draw from.

    Raises:
        NormalisationError: the images are no pixels in 0..1 once their normalisation is undone.

    >>> batches = ImageBatches([torch.rand(40, 3, 8, 8)], torch.zeros(1))
    >>> some = viewed(batches, Normalisation((0.0,), (1.0,)), share=0.5)
    >>> changed = [not torch.equal(a, b) for x, y in zip(batches, some) for a, b in zip(x, y)]
    >>> len(changed), 10 < sum(changed) < 30
    (40, True)
    """
    if not share:
        return batches

    def corrupt(batch: torch.Tensor, start: int) -> torch.Tensor:
        pixels = random_views(normalisation.pixels(batch), SEED, start, share, views)
        return normalisation.images(pixels).to(batch)

    return batches.mapped(corrupt)
