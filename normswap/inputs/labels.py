"""Class names on both sides, brought into one order; labels that no class of the model has."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..atomic import decoded
from ..errors import ArgumentError, DataError
from ..model_utils import pretrained_cfg

_NAMED = 5  # odd ones out in an error


def class_names(dataset: Any) -> list[str]:
    """Return the names of a data set's classes in the order of its labels; empty where it has none."""
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx", "classes"):
        classes = getattr(reader, attribute, None)
        if not classes:
            continue
        if not isinstance(classes, dict):
            return [str(name) for name in classes]
        # A class map may give several folders one label, and leave labels out.
        names: dict[int, str] = {}
        for name, label in classes.items():
            names.setdefault(int(label), str(name))
        return [names.get(label, str(label)) for label in range(max(names) + 1)]
    return []


def label_names(model: Any) -> list[list[str]]:
    """Return what timm's config calls the classes: ``label_names``, and their descriptions if they tell them apart."""
    config = pretrained_cfg(model)
    names, told = config.get("label_names"), config.get("label_descriptions")
    if not isinstance(names, list | tuple) or len(names) != getattr(model, "num_classes", None):
        return []
    descriptions = [str(told.get(name, name)) for name in names] if isinstance(told, dict) else []
    return [found for found in ([str(name) for name in names], descriptions) if found and _distinct(found)]


def _key(name: str) -> str:
    """Return what two spellings of a name share: a file system may give letters decomposed, or as bytes."""
    return unicodedata.normalize("NFC", decoded(name)).casefold().replace("_", " ").strip()


def _distinct(names: Sequence[str]) -> bool:
    return len({_key(name) for name in names}) == len(names)


def are_indices(names: Sequence[str]) -> bool:
    """Return whether the names are the labels themselves, as those of folders 0, 1, 2 or 000, 001, 002.

    >>> are_indices(["0", "1", "2"]), are_indices(["1", "2", "3"])
    (True, False)
    """
    return all(name.isdecimal() and int(name) == label for label, name in enumerate(names))


def label_order(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> tuple[int, ...] | None:
    """Return the model's label for each label of the data set, by name; None if the two sets of names differ.

    Args:
        found: names of the data set, by label.
        wanted: names of the model, by label, under each set of names it has.

    >>> label_order(["cat", "dog"], [["Dog", "Cat"]])
    (1, 0)
    """
    keys = [_key(name) for name in found]
    for names in wanted:
        places = {_key(name): label for label, name in enumerate(names)}
        if len(keys) == len(places) and set(keys) == places.keys():
            return tuple(places[key] for key in keys)
    return None


def odd_ones(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> str:
    """Say which names only one of the two sides has; empty if the model has no names.

    >>> odd_ones(["cat", ".git"], [["cat", "dog"]])
    "not among the model's: .git; not among these: dog"
    """
    if not wanted:
        return ""
    names = max(wanted, key=lambda names: len({_key(name) for name in names} & {_key(name) for name in found}))
    here, there = {_key(name): name for name in found}, {_key(name): name for name in names}
    extra, missing = ([a[key] for key in a if key not in b] for a, b in ((here, there), (there, here)))
    parts = (("not among the model's", extra), ("not among these", missing))
    return "; ".join(f"{text}: {_few(odd)}" for text, odd in parts if odd)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@dataclass(frozen=True)
class Labels:
    """How the labels of a data set fit a model.

    Attributes:
        classes: how many classes they have; None without labels.
        order: the model's label for each of them; None if they are the same.
        notes: what should be said of it.
    """

    classes: int | None = None
    order: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def fit_labels(model: Any, dataset: Any, where: str, named: bool, is_folder: bool) -> Labels:
    """Bring the labels of a data set to those of a model: by name where both have names, else by their number.

    Args:
        model: what the labels are for.
        dataset: timm's or torchvision's.
        where: what to call it.
        named: whether its classes go by its own names, not by a class map that the caller vouches for.
        is_folder: whether the order of its labels is that of its folders, which says nothing.

    Raises:
        DataError: other classes than the model's.
    """
    expected = getattr(model, "num_classes", 0)
    names, wanted = class_names(dataset), label_names(model) if named else []
    classes = len(names) if len(names) > 1 else None  # the only class of a flat folder says nothing
    if isinstance(getattr(dataset, "dataset", dataset), IterableDataset):
        classes = classes or expected or None  # checked with every batch
    if classes is None or not expected:
        return Labels(classes)
    odd = "" if are_indices(names) else odd_ones(names, wanted)
    advice = "give `class_map`, or `labels=False` to compare with the original only"
    if classes != expected:
        because = f" ({odd})" if names and odd else ""
        raise DataError(f"{where} has {classes} classes and the model has {expected}{because}: {advice}")
    if not names or not wanted or are_indices(names):
        return Labels(classes)
    order = label_order(names, wanted)
    if order is None and is_folder:
        raise DataError(f"{where}: its class folders are not the model's classes ({odd}): {advice}")
    if order is None:
        return Labels(classes, notes=(f"the classes of {where} have other names than the model's: {odd}",))
    if order == tuple(range(expected)):
        return Labels(classes)
    return Labels(classes, order, (f"labels of {where} go by name: its classes lie in another order than the model's",))


def check_labels(labels: Any, count: int, classes: int | None) -> torch.Tensor:
    """Return the labels of a batch as a tensor `[B]`.

    Args:
        labels: a tensor, an array or a list of whole numbers.
        count: how many images they belong to.
        classes: how many the model has; None if it has none.

    Raises:
        ArgumentError: no such numbers, not one for each image, or one that no class has.

    >>> check_labels([1, 2], 2, classes=2)
    Traceback (most recent call last):
        ...
    normswap.errors.ArgumentError: label 2, and the model's classes are 0 to 1: labels count from 0
    """
    try:
        found = labels if isinstance(labels, torch.Tensor) else torch.as_tensor(np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"labels must be whole numbers [B], not {type(labels).__name__}") from error
    whole = not found.is_complex() and found.dtype != torch.bool and bool((found == found.long()).all())
    if found.shape != (count,) or not whole:
        kind = str(found.dtype).removeprefix("torch.")
        raise ArgumentError(f"labels must be {count} whole numbers, one for each image, not {kind} {list(found.shape)}")
    if classes is not None and count:
        outside = found[(found < 0) | (found >= classes)]
        if len(outside):
            raise ArgumentError(
                f"label {int(outside[0])}, and the model's classes are 0 to {classes - 1}: labels count from 0"
            )
    return found.long()
