"""A look at the first batch of everything, and at one answer of the model, before hours of work depend on them."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, ModelRefusedError, first_line
from ..inputs.batches import checked, held_batches
from ..inputs.dataset import ImageSet
from ..inputs.labels import check_labels
from ..inputs.ranges import check_range
from ..model_utils import eval_mode, has_classes, single_output


class FirstLook:
    """Looks at images as the model will get them.

    Args:
        model: in the dtype in which it will run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.classes: dict[tuple[int, ...], int | None] = {}  # by size of the images that the model ran on

    def at(self, images: Any, name: str, labels: bool = False, needed: bool = False) -> tuple[Any, tuple[int, ...]]:
        """Return the images, nothing of them lost, and the size `(C, H, W)` of the first one.

        Args:
            images: in any form that `checked` takes.
            name: of the argument.
            labels: whether their labels will be used.
            needed: whether they must have some.

        Raises:
            ArgumentError: no images, or labels that the model does not have.
            ModelRefusedError: the model cannot run on such images, or answers with something else than one tensor.
        """
        found: torch.Tensor | None = None
        if isinstance(images, ImageSet):  # its form is known, and reading from it may start processes
            size, labelled = tuple(images.input_size), images.num_classes is not None
        else:
            (batch, found), images = _peeked(images, name)
            size, labelled = tuple(batch.shape[1:]), found is not None
        if size not in self.classes:
            self.classes[size] = self._run(size, name)
        if needed and not labelled:
            raise ArgumentError(f"{name}: the labels' loss is wanted, but the images have no labels")
        count = self.classes[size]
        if labels and found is not None and count is not None and int(found.max()) >= count:
            raise ArgumentError(f"{name}: label {int(found.max())}, and the model has classes 0 to {count - 1}")
        return images, size

    def _run(self, size: tuple[int, ...], name: str) -> int | None:
        """Return how many classes the model answers with, None for features."""
        weight = next(self.model.parameters())
        batch = torch.zeros(2, *size, device=weight.device, dtype=weight.dtype)
        try:
            with eval_mode(self.model), torch.no_grad():
                output = self.model(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model's own code makes of a size it is not made for
            turned = size[-1] in (1, 3) and size[0] not in (1, 3)
            hint = "; are the channels last? They must come first" if turned else ""
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ModelRefusedError(f"{name}: the model cannot run on images of {list(size)} ({why}){hint}") from error
        answer = single_output(output, "the model", len(batch))
        return answer.shape[1] if has_classes(self.model) and answer.ndim == 2 else None


def _peeked(images: Iterable[Any], name: str) -> tuple[tuple[torch.Tensor, torch.Tensor | None], Iterable[Any]]:
    """Return the first batch with its labels, and the images as if nothing had been taken."""
    try:
        pairs = checked(images)
        first = next(pairs, None)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from error
    if first is None:
        raise ArgumentError(f"{name}: there are no images")
    return first, chain([first], pairs) if isinstance(images, Iterator) else images


def look_at(model: nn.Module, given: Iterable[Any], items: list[Any], evaluation: Iterable[Any]) -> None:
    """Refuse whole numbers for pixels and labels of no class, and warn of pixels that do not look normalised.

    Looks at what is in memory only: an `ImageSet` is normalised by itself, and a stream can be gone through once.

    Args:
        model: what they are for.
        given: calibration images as the caller passed them.
        items: the same in a list: batches `[B, C, H, W]`, or tuples that start with one.
        evaluation: the same for the evaluation, with labels `[B]` behind the images; may be ``items``.

    Raises:
        ArgumentError: see `check_range` and `check_labels`.
    """
    looked_at: list[Iterable[Any]] = [] if isinstance(given, ImageSet) else [items]
    looked_at += [] if evaluation is items else [evaluation]
    for images in looked_at:
        for batch, _ in islice(held_batches(images), 1):
            check_range(batch, model)
    if not has_classes(model):
        return
    for batch, labels in held_batches(evaluation):
        if labels is not None:
            check_labels(labels, len(batch), getattr(model, "num_classes", None))
