"""Images that are in two sets: an accuracy measured on what was calibrated on is too good."""

import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Subset

from ..records.report import ConversionReport
from .batches import held_batches
from .dataset import ImageSet
from .stream import Stream


def shared_images(evaluation: Iterable[Any], others: Iterable[Iterable[Any] | None], total: int) -> int:
    """Return how many images of ``evaluation`` are in one of the other sets too; 0 where that cannot be told.

    Files are compared by their paths, tensors by their values.

    Args:
        evaluation: an `ImageSet` or batches.
        others: the same; None stands for no images.
        total: how many images ``evaluation`` has.
    """
    found = [images for images in others if images is not None]
    if any(images is evaluation for images in found):
        return total
    seen = {key for images in found for key in _keys(images)}
    return sum(key in seen for key in _keys(evaluation)) if seen else 0


def note_overlap(report: ConversionReport, evaluation: Iterable[Any], others: Iterable[Iterable[Any] | None]) -> None:
    """Write into a report how many evaluation images were calibrated or trained on too; see `shared_images`."""
    total = report.stages[0].n
    report.overlap = shared_images(evaluation, others, total)
    if report.overlap:
        count = "all" if report.overlap == total else f"{report.overlap} of them"
        report.evaluation_data += f" ({count} also used for calibration or training)"


def _keys(images: Iterable[Any]) -> Iterator[Any]:
    """Yield what tells one image from others."""
    if not isinstance(images, ImageSet):
        for batch, _ in held_batches(images):
            yield from (hash(image.contiguous().view(torch.uint8).numpy().tobytes()) for image in batch.detach().cpu())
        return
    base: Any = images.dataset
    places: Iterable[int] = range(len(images))
    if isinstance(base, Subset | Stream):
        base, places = base.dataset, base.indices if isinstance(base, Subset) else base.places
    samples = getattr(getattr(base, "reader", base), "samples", None)
    folder_of = functools.cache(os.path.realpath)  # a split may be a link to another
    for place in places:
        if samples is None:  # of data sets that are no files, only one and the same has the same images
            yield id(base), place
            continue
        name = samples[place][0]
        if isinstance(name, str):
            yield folder_of(os.path.dirname(name)), os.path.basename(name)
        else:  # an entry of a .tar, perhaps of one in it
            yield folder_of(str(base.reader.root)), name.offset_data, getattr(samples[place][2], "name", None)
