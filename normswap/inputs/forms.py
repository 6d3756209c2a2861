"""The forms in which callers have images and labels, read alike where they can mean one thing only."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import ArgumentError, first_line
from .ranges import refuse_integers

Pair = tuple[torch.Tensor, torch.Tensor | None]

# Hugging Face's names first.
_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")
_TAKEN = (
    "images must be batches [B, C, H, W] or single images [C, H, W]: tensors, arrays, tuples that start with one, or "
    f"dicts with {_IMAGES[0]!r}"
)


def items_of(images: Any) -> Iterable[Any]:
    """Return what is to be read one after the other: one array is one batch, a torch `Dataset` its single images.

    Raises:
        ArgumentError: a path, or something that cannot be iterated.

    >>> [type(item).__name__ for item in items_of({"pixel_values": torch.zeros(2, 3, 8, 8)})]
    ['dict']
    """
    if isinstance(images, str | os.PathLike):
        raise ArgumentError(f"{images} is a path: read the images with normswap.load_images first")
    if isinstance(images, Mapping) or _ndim(images) == 4 or _is_labelled_batch(images):
        return [images]
    if _ndim(images) is not None and _ndim(images) != 5:  # as batches stacked
        raise ArgumentError(f"one {_kind(images)} of images must be [B, C, H, W], not {list(images.shape)}")
    if isinstance(images, Dataset) and not hasattr(images, "__iter__"):
        return (images[index] for index in range(len(images)))  # type: ignore[arg-type]
    try:
        return iter(images)
    except TypeError as error:
        raise ArgumentError(f"{_TAKEN}; this is {_kind(images)}") from error


def pair_of(item: Any) -> Pair:
    """Return images `[B, C, H, W]`, or one image `[C, H, W]`, and the labels `[B]`, None where there are none.

    Raises:
        ArgumentError: something that is no images, is not normalised, or has labels that are no class numbers.

    >>> images, labels = pair_of({"pixel_values": np.zeros((2, 3, 8, 8), "float32"), "labels": [1, 0]})
    >>> images.shape, labels
    (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """
    found, labels = _parts(item)
    images = _tensor(found)
    if images is None or images.ndim not in (3, 4):
        shape = "" if images is None else f" {list(images.shape)}"
        hint = ": a transform to tensors is missing" if hasattr(found, "getbands") else ""
        raise ArgumentError(f"{_TAKEN}; there is {_kind(found)}{shape}{hint}")
    refuse_integers(images)
    images = images.detach()
    count = len(images) if images.ndim == 4 else 1
    # What was made in inference mode can take no part in a gradient.
    return images.clone() if images.is_inference() else images, class_numbers(labels, count)


def class_numbers(labels: Any, count: int) -> torch.Tensor | None:
    """Return labels of ``count`` images as integers `[B]`; None for None, and for what is no number, as file names.

    Raises:
        ArgumentError: another number of labels than images, or labels that are no class numbers.

    >>> class_numbers(np.array([[0, 1, 0], [1, 0, 0]]), 2)
    tensor([1, 0])
    """
    found = _tensor(labels)
    if found is None:
        return None
    found = found.detach().reshape(-1) if found.ndim == 0 else found.detach()
    if count == 1 and found.ndim == 1 and len(found) > 1:  # of a single image
        found = found[None]  # [K] -> [1, K]
    if found.ndim > 2:
        raise ArgumentError(f"labels must be class numbers [B], not {_dtype(found)} {list(found.shape)}")
    if len(found) != count:
        raise ArgumentError(f"{count} image{'s' * (count != 1)} with {len(found)} labels")
    if found.ndim == 2 and found.shape[1] > 1:
        one_hot = ((found == 0) | (found == 1)).all() and (found.sum(1) == 1).all()
        if not one_hot:
            raise ArgumentError(f"labels {list(found.shape)} are not one-hot: give class numbers [B], or images only")
        return found.to(torch.uint8).argmax(1)  # [B, K] -> [B]
    numbers = found.reshape(-1).long()
    if not torch.equal(numbers.to(found.dtype), found.reshape(-1)):
        raise ArgumentError("labels must be class numbers, and some are no whole numbers")
    if count and int(numbers.min()) < 0:
        raise ArgumentError(f"labels must be class numbers from 0, and one is {int(numbers.min())}")
    return numbers.clone() if numbers.is_inference() else numbers


def joined(pairs: Iterable[Pair], count: int) -> Iterator[Pair]:
    """Yield batches as they are, and single images `[C, H, W]` in batches of ``count``.

    Raises:
        ArgumentError: single images of different sizes.
    """
    held: list[Pair] = []
    for images, labels in pairs:
        if images.ndim == 4:
            if held:
                yield _stacked(held)
                held = []
            yield images, labels
            continue
        if held and held[0][0].shape != images.shape:
            shapes = f"{list(held[0][0].shape)} and {list(images.shape)}"
            raise ArgumentError(f"images must all have one size; there are {shapes}")
        held.append((images, labels))
        if len(held) == count:
            yield _stacked(held)
            held = []
    if held:
        yield _stacked(held)


def _stacked(held: list[Pair]) -> Pair:
    labels = [label for _, label in held if label is not None]
    return torch.stack([image for image, _ in held]), torch.cat(labels) if len(labels) == len(held) else None


def _parts(item: Any) -> tuple[Any, Any]:
    """Return what holds the images of an item, and what holds the labels."""
    if isinstance(item, Mapping):
        keys = [key for key in _IMAGES if key in item]
        if not keys:
            raise ArgumentError(f"{_TAKEN}; there is a dict with {', '.join(map(repr, item)) or 'nothing in it'}")
        return item[keys[0]], next((item[key] for key in _LABELS if key in item), None)
    if isinstance(item, tuple | list):
        if not item:
            raise ArgumentError(f"{_TAKEN}; there is an empty {_kind(item)}")
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _tensor(value: Any) -> torch.Tensor | None:
    """Return numbers in any form as a tensor; None if they are none."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, str | bytes | Mapping) or value is None or hasattr(value, "getbands"):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return None
    if array.dtype.kind not in "biuf":
        return None
    # torch knows neither foreign byte orders nor negative strides, and warns of memory it must not write to.
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    try:
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except TypeError as error:  # as float128
        raise ArgumentError(f"{array.dtype} arrays are not understood: {first_line(error)}") from error


def _ndim(value: Any) -> int | None:
    return value.ndim if isinstance(value, torch.Tensor | np.ndarray) else None


def _is_labelled_batch(images: Any) -> bool:
    """Return whether this is one pair of images and labels, and no list of batches."""
    if not isinstance(images, tuple | list) or len(images) != 2 or _ndim(images[0]) != 4:
        return False
    return (_ndim(images[1]) or 3) <= 2


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
