"""Images in, by timm's own readers, transforms and data config; an image that cannot be read is named and counted."""

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform, resolve_input_data_config
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..errors import ArgumentError, DataError, first_line
from .image_files import (
    SUFFIXES,
    FileCount,
    ReadableImages,
    all_suffixes,
    collate,
    count_files,
    filename,
    loaded,
    open_rgb,
)
from .labels import Labels, class_names, fit_labels
from .splits import is_called, split_root, split_roots
from .stream import Stream

# What timm's data config can be told.
_CONFIG = ("input_size", "img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# Data sets of torchvision's that are a folder of class folders, and lie as timm's own do.
_FOLDERS = ("", "torch/image_folder", "torch/folder")

Batch = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class ImageSet:
    """One split of a data set, as a model wants it.

    Attributes:
        dataset: a timm or torchvision dataset without transform, or a subset of one.
        transform: timm's evaluation transform for the model.
        description: which images these are, for people.
        num_classes: how many classes the labels have; None if the images carry none.
        input_size: (channels, height, width) of the images after the transform.
        mode: PIL's name of the channels, "RGB" or "L".
        mean, std: of the transform's normalisation, per channel.
        label_order: the model's label for each label of the data set; None if they are the same.
        files: how many files were read and left, by suffix; None for data sets that are no files.
        notes: what else should be known of them, for people.
        batch_size, workers: of the loader.
        max_skipped: how many unreadable images are tolerated.
        skipped: names of the unreadable images met so far.
    """

    dataset: Any
    transform: Any
    description: str
    num_classes: int | None
    input_size: tuple[int, int, int]
    mode: str = "RGB"
    batch_size: int = 64
    workers: int = 0
    max_skipped: int = 10
    skipped: dict[str, str] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    label_order: tuple[int, ...] | None = None
    files: FileCount | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches of images `[B, C, H, W]` and labels `[B]` (None without labels).

        Raises:
            DataError: more than ``max_skipped`` images, or all of them, cannot be read.
        """
        # Each worker of a stream would read all of it, so one reads for all.
        stream = isinstance(self.dataset, Stream)
        loader = DataLoader(
            self.dataset.read(self.transform, self.mode)
            if stream
            else ReadableImages(self.dataset, self.transform, self.mode),
            batch_size=self.batch_size,
            num_workers=min(self.workers, 1) if stream else self.workers,
            collate_fn=collate,
        )
        seen = 0
        for images, labels, skipped in loaded(loader, self.description):
            self.skipped.update(skipped)
            if len(self.skipped) > self.max_skipped:
                name, why = next(iter(self.skipped.items()))
                raise DataError(
                    f"{len(self.skipped)} images of {self.description} cannot be read, the first {name} ({why}); "
                    f"allow more with `max_skipped`"
                )
            if images is not None:
                seen += len(images)
                yield images, self._model_labels(labels)
        if not seen:
            name, why = next(iter(self.skipped.items()), ("", ""))
            raise DataError(f"no image of {self.description} can be read{f', as {name} ({why})' if name else ''}")

    def _model_labels(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Return labels `[B]` as the model counts them; a stream does not say beforehand how many it has."""
        if self.num_classes is None:
            return None
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise DataError(
                f"{self.description}: label {int(outside[0])}, and the model has {self.num_classes} classes: "
                f"give `class_map`, or `labels=False` to compare with the original only"
            )
        return labels if self.label_order is None else torch.tensor(self.label_order)[labels]

    def draw(self, count: int, seed: int, skip: int = 0) -> "ImageSet":
        """Return a random subset of ``count`` images (all if there are fewer), the same for the same seed.

        Args:
            count: how many.
            seed: draws them; a smaller subset of the same seed lies in a larger one.
            skip: leave out those that ``draw(skip, seed)`` returns.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = sorted(order[skip : skip + count].tolist())
        description = f"{len(chosen)} of {self.description}, seed {seed}"
        subset = self.dataset.subset(chosen) if isinstance(self.dataset, Stream) else Subset(self.dataset, chosen)
        return replace(self, dataset=subset, description=description, skipped={})

    def filename(self, position: int) -> str:
        """Return the name of an image by its place among those that iterating gave; "image 17" where it has none."""
        if not self.skipped:
            return filename(self.dataset, position)
        names = (filename(self.dataset, index) for index in range(len(self)))
        return next(itertools.islice((name for name in names if name not in self.skipped), position, None))

    @property
    def classes(self) -> list[str]:
        """Names of the classes by the model's label, from the folders or the class map; empty without labels."""
        base = self.dataset.dataset if isinstance(self.dataset, Subset | Stream) else self.dataset
        names = [] if self.num_classes is None else class_names(base)
        if self.label_order is None or not names:
            return names
        return [name for _, name in sorted(zip(self.label_order, names, strict=True))]


def describe(images: Any, count: int) -> str:
    """Say in a few words which images these are.

    Args:
        images: an `ImageSet`, or what else the caller passed.
        count: how many they are.
    """
    return images.description if isinstance(images, ImageSet) else f"{count} images passed by the caller"


def load_images(
    model: nn.Module,
    data_dir: str | Path | None,
    split: str,
    dataset: str = "",
    class_map: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    labels: bool = True,
    max_skipped: int = 10,
    samples: int | None = None,
    seed: int = 42,
    **config: Any,
) -> ImageSet:
    """Return one split of a data set with the transform that the model's own data config asks for.

    Args:
        model: a timm model.
        data_dir: a folder of class folders, a folder with one folder or .tar per split, or a .tar.
        split: timm's name of the split, as "train" or "validation".
        dataset: timm's dataset name ("torch/cifar10", "hfds/..."); default: a folder or tar of images.
        class_map: timm's class map file.
        batch_size, workers: of the loader.
        labels: False to ignore the folder names.
        max_skipped: how many unreadable images to tolerate.
        samples, seed: how many images to draw at random, and what draws them; default: all.
        config: overrides of the data config: input_size, img_size, mean, std, interpolation, crop_pct, crop_mode.

    Raises:
        ArgumentError: the path does not exist, an unknown keyword, or a folder of which it is not clear what its
            splits are.
        DataError: no images, or labels that do not fit the model.

    >>> from normswap.demo import FOLDER, MODEL
    >>> images = load_images(normswap.load_model(MODEL), FOLDER, "train")
    >>> images.description, images.num_classes, images.input_size
    ('320 images of demo/train.tar', 10, (3, 32, 32))
    >>> batch, labels = next(iter(images.draw(5, seed=0)))
    >>> batch.shape, labels.shape
    (torch.Size([5, 3, 32, 32]), torch.Size([5]))
    """
    root = None if data_dir is None else Path(data_dir)
    if dataset in _FOLDERS and root is not None:
        root = split_root(root, split)
    images = _open(model, root, split, dataset, class_map, labels, config)
    if root is not None and root != Path(data_dir or "") and not is_called(root, split):
        images.notes += (f"{data_dir} has no split {split}: {root.name} is used",)
    images.batch_size, images.workers, images.max_skipped = batch_size, workers, max_skipped
    return images if samples is None else images.draw(samples, seed)


def _open(
    model: nn.Module,
    root: Path | None,
    split: str,
    dataset: str,
    class_map: str | None,
    labels: bool,
    config: dict[str, Any],
) -> ImageSet:
    """Return the images at ``root``, where the split itself lies if it is a folder; see `load_images`."""
    data_config, transform = _transform(model, config)
    channels = data_config["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"the model takes {channels} channels; images are read with 1 or 3")
    if not dataset and root is None:
        raise ArgumentError("which images? Give `data_dir` or `dataset`")
    if not dataset.startswith("hfds/") and root is None:
        raise ArgumentError(f"`dataset` {dataset} also needs `data_dir`, the folder it lies in")
    mode = "L" if channels == 1 else "RGB"
    found = _create(dataset, root, split, class_map, mode)
    where = f"{dataset or root} ({split})" if dataset else str(root)
    is_folder = dataset in _FOLDERS and root is not None
    fitted = fit_labels(model, found, where, class_map is None, is_folder) if labels else Labels()
    short = where if dataset or root is None else f"{root.resolve().parent.name}/{root.name}"
    return ImageSet(
        found,
        transform,
        f"{len(found)} images of {short}",
        fitted.classes,
        tuple(data_config["input_size"]),
        mode,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
        label_order=fitted.order,
        files=count_files(root, getattr(found, "reader", found)) if is_folder and root is not None else None,
        notes=fitted.notes,
    )


def _transform(model: nn.Module, config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return timm's data config of the model with the overrides in it, and the transform it asks for."""
    for name in config:
        if name not in _CONFIG:
            close = difflib.get_close_matches(name, (*_CONFIG, "samples", "seed", "batch_size", "workers", "labels"), 1)
            hint = f"; did you mean `{close[0]}`?" if close else f"; beside its own it takes {', '.join(_CONFIG)}"
            raise ArgumentError(f"load_images takes no argument {name!r}{hint}")
    overrides = {k: v for k, v in config.items() if v is not None}
    try:
        data_config = resolve_input_data_config(model, args=overrides)
        return data_config, create_transform(**data_config, is_training=False)
    except (AssertionError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ArgumentError(f"no transform can be made of {overrides}: {type(error).__name__}: {error}") from error


def load_splits(
    model: nn.Module,
    data_dir: str | Path | None,
    train_split: str,
    split: str,
    dataset: str = "",
    train_labels: bool = False,
    **options: Any,
) -> tuple[ImageSet, ImageSet]:
    """Return the images to calibrate on and the images to evaluate on; the same split where there is only one.

    Args:
        model: a timm model.
        data_dir, dataset: see `load_images`.
        train_split: where calibration images come from, if it exists.
        split: where evaluation images come from.
        train_labels: whether the labels of the training split are wanted; if not, they need not fit the model.
        options: the other arguments of `load_images`.

    Raises:
        ArgumentError, DataError: see `load_images`.
    """
    if dataset in _FOLDERS and data_dir is not None:
        train, evaluated = split_roots(Path(data_dir), train_split, split)
        one = train == evaluated
        # Where only the other split is there, that is the one to look for.
        if one and not is_called(evaluated, split) and is_called(evaluated, train_split):
            split = train_split
    else:
        one = train_split == split
    evaluation = load_images(model, data_dir, split, dataset, **options)
    if one:
        return evaluation, evaluation
    if not train_labels:
        options["labels"] = False
    return load_images(model, data_dir, train_split, dataset, **options), evaluation


def _create(dataset: str, root: Path | None, split: str, class_map: str | None, mode: str) -> Any:
    where = f"{dataset or root}"
    # What wds/ and hfids/ decode they hand over as it is, for 16 bits to be scaled here.
    decoded = "" if dataset.lower().startswith(("wds/", "hfids/")) else mode
    try:
        with all_suffixes():
            found = create_dataset(
                dataset,
                root=None if root is None else str(root),
                split=split,
                search_split=False,
                class_map=class_map,  # type: ignore[arg-type]  # timm takes a file name as well
                input_img_mode=decoded,
            )
    except ImportError as error:
        raise DataError(f"{where}: timm needs another package for it: {error}") from error
    except Exception as error:  # timm's readers raise RuntimeError, ValueError and AssertionError for "no images"
        empty = "not enough values to unpack" in str(error) or "Found 0 images" in str(error)
        raise DataError(f"{where}: {_what_lies_there(root) if empty and root else first_line(error)}") from error
    if hasattr(found, "loader"):  # torchvision's clips wide pixels
        found.loader = open_rgb
    if not isinstance(found, IterableDataset):
        return found
    if len(found) == 0:  # type: ignore[arg-type]  # timm's has a length
        raise DataError(
            f"{where}: the stream does not say how many images it has; for wds/ write that into _info.json, or behind "
            f"`split`, for example 'val-{{0000..0007}}.tar|5000'"
        )
    return Stream(found)


def _what_lies_there(root: Path) -> str:
    """Say why no images were found."""
    left = count_files(root).left
    there = f"; there are {FileCount(left=left).line().rpartition(': ')[2]}" if left else ""
    return f"no images in it{there}; read are {', '.join(SUFFIXES)}"
