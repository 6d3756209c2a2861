"""Any iterable of images as batches of one size, checked once."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import ArgumentError

# Images that go through the models together. Small enough for the caches, large enough for the matrix products.
BATCH_SIZE = 32


def rebatched(images: Iterable[Any], size: int) -> Iterator[torch.Tensor]:
    """Yield the images `[B, C, H, W]` in batches of ``size``, the last one smaller."""
    held: list[torch.Tensor] = []
    count = 0
    for item in images:
        batch = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
            raise ArgumentError("images must be batches [B, C, H, W], or tuples that start with one")
        if held and batch.shape[1:] != held[0].shape[1:]:
            raise ArgumentError(
                f"images must all have one size; there are {list(held[0].shape[1:])} and {list(batch.shape[1:])}"
            )
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
    """Return all images `[M, C, H, W]` and, if every batch has some, their labels `[M]`."""
    pixels: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for item in images:
        batch, *rest = item if isinstance(item, tuple | list) else (item,)
        if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
            raise ArgumentError("images must be batches [B, C, H, W], or tuples that start with one")
        if pixels and batch.shape[1:] != pixels[0].shape[1:]:
            raise ArgumentError(
                f"images must all have one size; there are {list(pixels[0].shape[1:])} and {list(batch.shape[1:])}"
            )
        pixels.append(batch.to(like))
        if rest and isinstance(rest[0], torch.Tensor):
            labels.append(rest[0].to(like.device))
    if not pixels:
        raise ArgumentError("fine-tuning wants at least two images, there are 0 (to train on, or held out)")
    return torch.cat(pixels), torch.cat(labels) if len(labels) == len(pixels) else None
