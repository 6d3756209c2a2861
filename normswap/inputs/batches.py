"""Images in any form as batches of one size, checked once."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch

from ..errors import ArgumentError
from .forms import items_of, joined, pair_of

# Images that go through the models together. Small enough for the caches, large enough for the matrix products.
BATCH_SIZE = 32
# Calibration holds one batch in five out to choose by, so few images make small batches.
HELD_OUT = 5
FEW = 100  # images: less than a hundred


def checked(images: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield images `[B, C, H, W]` and labels `[B]`, None where there are none, as the caller batched them.

    Args:
        images: batches `[B, C, H, W]` or single images `[C, H, W]`, which are put into batches: tensors or numpy
            arrays, tuples or lists that start with one and go on with the labels, or dicts as Hugging Face has them,
            ``{"pixel_values": images, "labels": labels}``; also a single one of those batches, or a torch `Dataset` of
            single images. Labels are class numbers `[B]`, or one-hot `[B, K]`.

    Raises:
        ArgumentError: something that is no image, images that are not normalised or have different sizes, labels that
            are no class numbers or not as many as the images.

    >>> [(batch.shape, labels) for batch, labels in checked([{"image": torch.zeros(3, 8, 8), "label": 4}] * 2)]
    [(torch.Size([2, 3, 8, 8]), tensor([4, 4]))]
    """
    size: torch.Size | None = None
    for batch, labels in joined(map(pair_of, items_of(images)), BATCH_SIZE):
        size = size or batch.shape[1:]
        if batch.shape[1:] != size:
            raise ArgumentError(f"images must all have one size; there are {list(size)} and {list(batch.shape[1:])}")
        if len(batch):
            yield batch, labels


def held_batches(images: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield what `checked` does of images that lie in memory; nothing of what is read, or can be gone through once.

    >>> [len(batch) for batch, _ in held_batches((torch.zeros(4, 3, 8, 8), torch.zeros(4)))]
    [4]
    >>> list(held_batches(iter([torch.zeros(4, 3, 8, 8)])))
    []
    """
    if isinstance(images, list | tuple | Mapping | torch.Tensor | np.ndarray):
        yield from checked(images)


def rebatched(images: Iterable[Any], size: int) -> Iterator[torch.Tensor]:
    """Yield the images `[B, C, H, W]` in their order, in batches of ``size``, the last one smaller.

    Raises:
        ArgumentError: see `checked`.

    >>> [len(batch) for batch in rebatched([torch.zeros(3, 1, 8, 8), torch.zeros(4, 1, 8, 8)], 2)]
    [2, 2, 2, 1]
    """
    held: list[torch.Tensor] = []
    count = 0
    for batch, _ in checked(images):
        held.append(batch)
        count += len(batch)
        if count >= size:
            joined = torch.cat(held) if len(held) > 1 else held[0]
            whole = count - count % size
            yield from joined[:whole].split(size)
            held, count = [joined[whole:]], count - whole
    if count:
        yield torch.cat(held)


def gather(images: Iterable[Any], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return all images `[M, C, H, W]` in the dtype and on the device of ``like``, and their labels `[M]`.

    The labels are None unless every batch has some.

    Raises:
        ArgumentError: see `checked`; also without any image.
    """
    found = [(batch.to(like), labels) for batch, labels in checked(images)]
    if not found:
        raise ArgumentError("there are no images")
    known = [labels.to(like.device) for _, labels in found if labels is not None]
    return torch.cat([batch for batch, _ in found]), torch.cat(known) if len(known) == len(found) else None


class ImageBatches(Sequence[torch.Tensor]):
    """Images in batches `[B, C, H, W]` of one size, in a random order that is always the same.

    Folders are read class by class. In that order the images held out would be of other classes than those fitted to.

    Args:
        images: see `checked`.
        like: a parameter of the model, whose dtype and device the images get.

    Raises:
        ArgumentError: see `checked`; also without any image.

    >>> batches = ImageBatches([torch.zeros(40, 3, 8, 8)], torch.zeros(1))
    >>> len(batches), batches.image_count, batches.input_size
    (5, 40, (3, 8, 8))
    """

    def __init__(self, images: Iterable[Any], like: torch.Tensor) -> None:
        found = [image for batch, _ in checked(images) for image in batch.to(like)]
        if not found:
            raise ArgumentError("no images to calibrate on")
        size = max(1, min(BATCH_SIZE, len(found) // HELD_OUT))
        # A size that divides their number saves an export for the last batch, which takes longer than few images do.
        least = size - size // (2 if len(found) < FEW else 4)
        size = min(range(size, least - 1, -1), key=lambda n: len(found) % n > 0)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).split(size)
        # [C, H, W] each -> [B, C, H, W]
        self._batches = [torch.stack([found[index] for index in indices.tolist()]) for indices in order]
        self.image_count = len(found)

    @classmethod
    def of(cls, images: Iterable[Any], like: torch.Tensor) -> "ImageBatches":
        """Return the images as they are if they are such batches already, in that dtype and on that device."""
        if isinstance(images, cls) and (images[0].dtype, images[0].device) == (like.dtype, like.device):
            return images
        return cls(images, like)

    def mapped(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> "ImageBatches":
        """Return batches of what ``change`` makes of each, given the place of its first image; they may grow."""
        result = copy.copy(self)
        starts = itertools.accumulate(map(len, self._batches), initial=0)
        result._batches = [change(batch, start) for batch, start in zip(self._batches, starts, strict=False)]
        result.image_count = sum(map(len, result._batches))
        return result

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self._batches[0].shape[1:]
        return channels, height, width

    def first(self, count: int) -> list[torch.Tensor]:
        """Return the first ``count`` images, or all if there are fewer, in batches `[B, C, H, W]`.

        >>> batches = ImageBatches([torch.zeros(40, 3, 8, 8)], torch.zeros(1))
        >>> [len(batch) for batch in batches.first(20)]
        [8, 8, 4]
        """
        size = len(self._batches[0])
        return [batch[: count - i * size] for i, batch in enumerate(self._batches) if i * size < count]

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        return self._batches[index]
