"""Pixel values as a model wants them: whole numbers are refused, values far from normalised ones are warned of."""

import warnings
from typing import Any

import torch

from ..errors import ArgumentError
from ..model_utils import pretrained_cfg

# How many times the spread that black and white have after normalisation. Random numbers of unit variance stay below.
_FAR = 3.0
# How near to 0 and to 1 a batch of pictures in 0..1 comes.
_EDGE = 0.1


def refuse_integers(images: torch.Tensor) -> None:
    """Refuse pixels that no transform has normalised.

    Raises:
        ArgumentError: ``images`` are whole numbers.

    >>> refuse_integers(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    Traceback (most recent call last):
        ...
    normswap.errors.ArgumentError: images are whole numbers (uint8): scale them to 0..1 and normalise them with ...
    """
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise ArgumentError(
            f"images are whole numbers ({kind}): scale them to 0..1 and normalise them with the model's mean and std "
            f"first; load_images does"
        )


def range_problem(images: torch.Tensor, model: Any) -> str | None:
    """Say what is odd about the values of images `[B, C, H, W]`; None if nothing is, or the model's range is unknown.

    >>> model = timm.create_model("test_vit")  # its mean and std are 0.5
    >>> range_problem((torch.rand(8, 3, 32, 32) * 255).round(), model)
    'images do not look normalised: values from 0 to 255, mean 12...; by mean and std of the model they lie in -1..1'
    >>> range_problem(torch.rand(8, 3, 32, 32) * 2 - 1, model) is None
    True
    """
    config = pretrained_cfg(model)
    if not config.get("mean") or not config.get("std") or not images.numel():
        return None
    black = min(-mean / std for mean, std in zip(config["mean"], config["std"], strict=False))
    white = max((1 - mean) / std for mean, std in zip(config["mean"], config["std"], strict=False))
    half = (white - black) / 2
    values = images.detach().float()
    low, high, mean, std = (float(x) for x in (values.min(), values.max(), values.mean(), values.std()))
    is_far = std > _FAR * half or abs(mean - (white + black) / 2) > _FAR * half
    # Pictures in 0..1 have nothing darker than the mean, which no ordinary batch lacks.
    is_unit = black < -0.5 and 0 <= low < _EDGE and 1 - _EDGE < high <= 1
    if not is_far and not is_unit:
        return None
    return (
        f"images do not look normalised: values from {low:.3g} to {high:.3g}, mean {mean:.3g}; by mean and std of the "
        f"model they lie in {black:.3g}..{white:.3g}"
    )


def check_range(images: torch.Tensor, model: Any) -> None:
    """Refuse whole numbers, and warn of values that do not look normalised.

    Args:
        images: one batch `[B, C, H, W]`.
        model: what they are for.

    Raises:
        ArgumentError: see `refuse_integers`.
    """
    refuse_integers(images)
    problem = range_problem(images, model)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)
