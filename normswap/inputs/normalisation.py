"""The way from a model's normalised images back to pixels in 0..1, and forth again."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..model_utils import pretrained_cfg
from .dataset import ImageSet

_SLACK = 0.02  # a pixel may lie so far outside 0..1 after the way back: half precision rounds a normalised 2.6 by 0.001


class NormalisationError(ArgumentError):
    """Images of which nobody knows how they were normalised."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, repeated where a model has more channels.

    >>> normalisation = Normalisation((0.5,), (0.25,))
    >>> normalisation.pixels(torch.full((1, 3, 1, 1), 2.0)).flatten()
    tensor([1., 1., 1.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls,
        images: Iterable[Any],
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> "Normalisation":
        """Return what the images were normalised with.

        Args:
            images: an `ImageSet` knows it.
            model: timm's config of the model says it for other images.
            mean, std: come first.

        Raises:
            NormalisationError: nobody knows.
        """
        config: Any = pretrained_cfg(model)
        known = (images.mean, images.std) if isinstance(images, ImageSet) else (config.get("mean"), config.get("std"))
        mean, std = mean or known[0], std or known[1]
        if not mean or not std or min(std) <= 0:
            raise NormalisationError("how were the images normalised? Give `mean` and `std` (above 0), one per channel")
        return cls(tuple(map(float, mean)), tuple(map(float, std)))

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised images `[B, C, H, W]` as pixels in 0..1.

        Raises:
            NormalisationError: they are none, so they were normalised otherwise.
        """
        mean, std = self._vectors(images)
        pixels = images * std + mean
        low, high = (float(v) for v in pixels.aminmax())
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise NormalisationError(
                f"images without their normalisation reach from {low:.2f} to {high:.2f}, not from 0 to 1: "
                f"give the `mean` and `std` that they were normalised with"
            )
        return pixels.clamp(0, 1)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels `[B, C, H, W]` as the model wants them."""
        mean, std = self._vectors(pixels)
        return (pixels - mean) / std

    def _vectors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels = x.shape[1]
        mean, std = (list(itertools.islice(itertools.cycle(v), channels)) for v in (self.mean, self.std))
        return x.new_tensor(mean).view(-1, 1, 1), x.new_tensor(std).view(-1, 1, 1)  # [C, 1, 1]
