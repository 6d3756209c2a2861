"""Other views of the training images. The teacher answers for the same view, so no view has a wrong label.

Distillation on few images overfits to them; views that student and teacher share are the cure (Beyer et al. 2022,
"Knowledge distillation: A good teacher is patient and consistent", section 3).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..calibration.options import SHARE
from ..evaluation.corruptions import random_views
from ..inputs.normalisation import Normalisation, NormalisationError

_READ = 256  # images whose pixels are looked at together
_MOST_STRETCHED = 1.1  # width over height of a crop, or height over width


def views(x: torch.Tensor, hflip: float, scale: float, seed: int) -> torch.Tensor:
    """Return a random view of each image `[B, C, H, W]`, the same for the same seed.

    Args:
        x: normalised images.
        hflip: how likely an image is mirrored.
        scale: least share of an image's area that a crop keeps; it is resized to the old size. 1 for no crops.
        seed: draws the views.
    """
    generator = torch.Generator().manual_seed(seed)
    if hflip > 0:
        mirrored = torch.rand(len(x), generator=generator) < hflip
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)  # [B] -> [B, 1, 1, 1]
    if scale < 1:
        x = cropped(x, _boxes(len(x), scale, generator))
    return x


def _boxes(count: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Return top, left, height and width of random crops `[B, 4]` as shares of the image.

    They are drawn as Szegedy et al. 2015 do ("Going Deeper with Convolutions", section 6), with sides that differ less:
    each crop's area is uniform from ``scale`` to 1 and the logarithm of its aspect ratio uniform.
    """
    area, ratio, top, left = torch.rand(4, count, generator=generator)  # [B] each
    area, ratio = scale + (1 - scale) * area, (2 * ratio - 1).mul(math.log(_MOST_STRETCHED)).exp()
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], dim=1)  # [B, 4]


def cropped(x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return a crop of each image `[B, C, H, W]`, resized to the old size, all at once: one by one keeps a GPU waiting.

    Args:
        x: the images.
        boxes: top, left, height and width of each crop as shares of the image `[B, 4]`.
    """
    wide = x if x.dtype == torch.float64 else x.float()  # in half precision places are off by a pixel
    boxes = boxes.to(wide)
    corner, size = boxes[:, :2], boxes[:, 2:]  # [B, 2]: y, x
    theta = wide.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = size[:, 1], size[:, 0]
    theta[:, :, 2] = (2 * corner + size - 1).flip(1)  # the centre, from -1 to 1 over the image, x before y
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # [B, 2, 3] -> [B, H, W, 2]
    # Beyond the crop lies the rest of the image, and beyond the image its border: no resize looks further either.
    return F.grid_sample(wide, grid, mode="bilinear", padding_mode="border", align_corners=False).to(x.dtype)


@dataclass(frozen=True)
class Corrupted:
    """Puts a random corruption on a share of the images, for student and teacher alike.

    Attributes:
        share: how likely an image is corrupted.
        normalisation: leads back to pixels; None where nobody knows it, and nothing is corrupted.
    """

    share: float
    normalisation: Normalisation | None

    @classmethod
    def of(
        cls,
        share: float | None,
        images: Iterable[Any],
        pixels: torch.Tensor,
        model: nn.Module,
        normalisation: Normalisation | None = None,
    ) -> "Corrupted":
        """Return what the option says, or half of the images if it says nothing and they are pixels.

        Args:
            share: as it was asked for.
            images: as they were given.
            pixels: the same in one tensor `[M, C, H, W]`.
            model: whose config may say how they were normalised.
            normalisation: of the images, if that is known.

        Raises:
            NormalisationError: a share is asked for, and the images are no pixels in 0..1 without their normalisation.
        """
        if share == 0:
            return cls(0.0, None)
        try:
            normalisation = normalisation or Normalisation.of(images, model)
            for part in pixels.split(_READ):
                normalisation.pixels(part)
        except NormalisationError:
            if share is not None:
                raise
            return cls(0.0, None)
        return cls(SHARE if share is None else share, normalisation)

    def __call__(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Return normalised images `[B, C, H, W]`, some of them corrupted; the same for the same seed."""
        if self.normalisation is None:
            return x
        return self.normalisation.images(random_views(self.normalisation.pixels(x), seed, share=self.share)).to(x)
