"""Images that come one after the other, read as if each had a place."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset


class Stream:
    """Images that come one after the other, as from WebDataset shards: a subset is read in one pass over all.

    Args:
        dataset: timm's, with pairs of image and label.
        places: which of them, in rising order; default: all.
    """

    def __init__(self, dataset: Any, places: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.places = range(len(dataset)) if places is None else places
        self.reader = dataset.reader

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, chosen: Sequence[int]) -> "Stream":
        """Return the images at these places among those it has."""
        return Stream(self.dataset, [self.places[i] for i in chosen])

    def read(self, transform: Any) -> "_Reading":
        """Return what a loader reads from."""
        return _Reading(self, transform)


class _Reading(IterableDataset):
    def __init__(self, stream: Stream, transform: Any) -> None:
        self.stream, self.transform = stream, transform

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, None]]:
        wanted = iter(self.stream.places)
        place = next(wanted, None)
        for at, (image, label) in enumerate(self.stream.dataset):
            if place is None:
                return
            if at == place:
                yield self.transform(image), -1 if label is None else int(label), None
                place = next(wanted, None)
