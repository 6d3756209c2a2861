"""Images that come one after the other, read as if each had a place."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from ..errors import first_line
from .image_files import Item, to_8_bits


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

    def read(self, transform: Any, mode: str) -> "_Reading":
        """Return what a loader reads from: images in ``mode``, "RGB" or "L", brought to tensors by ``transform``."""
        return _Reading(self, transform, mode)


class _Reading(IterableDataset[Item]):
    def __init__(self, stream: Stream, transform: Any, mode: str) -> None:
        self.stream, self.transform, self.mode = stream, transform, mode

    def __iter__(self) -> Iterator[Item]:
        wanted = iter(self.stream.places)
        place = next(wanted, None)
        for at, (image, label) in enumerate(self.stream.dataset):
            if place is None:
                return
            if at == place:
                yield self._item(image, label, place)
                place = next(wanted, None)
        # timm leaves broken images of shards out without a word, and later ones move up.
        for missing in () if place is None else itertools.chain([place], wanted):
            yield None, -1, (f"image {missing}", "the stream ended before it: broken images in it, or a wrong count")

    def _item(self, image: Any, label: Any, place: int) -> Item:
        try:
            return self.transform(to_8_bits(image, self.mode)), -1 if label is None else int(label), None
        except Exception as error:  # as for files
            return None, -1, (f"image {place}", first_line(error))
