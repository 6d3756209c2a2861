"""Images in, by timm's own readers, transforms and data config; an image that cannot be read is named and counted."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_input_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..errors import ArgumentError, DataError, first_line
from .stream import Stream

# timm's synonyms, in the order in which they are looked for.
_TRAIN = ("train", "training")
_EVAL = ("validation", "val", "valid", "eval", "evaluation")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

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
            self.dataset.read(self.transform) if stream else _Readable(self.dataset, self.transform, self.mode),
            batch_size=self.batch_size,
            num_workers=min(self.workers, 1) if stream else self.workers,
            collate_fn=_collate,
        )
        seen = 0
        for images, labels, skipped in loader:
            self.skipped.update(skipped)
            if len(self.skipped) > self.max_skipped:
                name, why = next(iter(self.skipped.items()))
                raise DataError(
                    f"{len(self.skipped)} images of {self.description} cannot be read, the first {name} ({why}); "
                    f"allow more with `max_skipped`"
                )
            if images is not None:
                seen += len(images)
                self._check_labels(labels)
                yield images, labels if self.num_classes is not None else None
        if not seen:
            name, why = next(iter(self.skipped.items()), ("", ""))
            raise DataError(f"no image of {self.description} can be read{f', as {name} ({why})' if name else ''}")

    def _check_labels(self, labels: torch.Tensor) -> None:
        """Raise for labels that no class of the model has; a stream does not say beforehand how many it has."""
        if self.num_classes is not None and isinstance(self.dataset, Stream) and int(labels.max()) >= self.num_classes:
            raise DataError(
                f"{self.description}: label {int(labels.max())}, and the model has {self.num_classes} classes: "
                f"give `class_map`, or `labels=False` to compare with the original only"
            )

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
            return _filename(self.dataset, position)
        names = (_filename(self.dataset, index) for index in range(len(self)))
        return next(itertools.islice((name for name in names if name not in self.skipped), position, None))

    @property
    def classes(self) -> list[str]:
        """Names of the classes by label, from the folders or the class map; empty without labels."""
        base = self.dataset.dataset if isinstance(self.dataset, Subset | Stream) else self.dataset
        return [] if self.num_classes is None else _classes(base)


def describe(images: Any, count: int) -> str:
    """Say in a few words which images these are.

    Args:
        images: an `ImageSet`, or what else the caller passed.
        count: how many they are.
    """
    return images.description if isinstance(images, ImageSet) else f"{count} images passed by the caller"


def _filename(dataset: Any, index: int) -> str:
    if isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        return str(dataset.filename(index))
    except (AttributeError, AssertionError, KeyError, TypeError, NotImplementedError):  # not every reader has names
        return f"image {index}"


class _Readable(Dataset):
    """Gives (image, label, None), or (None, label, (name, reason)) for an image that cannot be read."""

    def __init__(self, dataset: Any, transform: Any, mode: str) -> None:
        self.dataset, self.transform, self.mode = dataset, transform, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, int, tuple[str, str] | None]:
        base: Any = self.dataset
        at = index
        if isinstance(base, Subset):
            base, at = base.dataset, base.indices[index]
        try:
            if hasattr(base, "reader"):  # timm's own __getitem__ would put the next image in the place of a broken one
                stream, label, *_ = base.reader[at]
                with stream:
                    image = Image.open(stream).convert(base.input_img_mode)
            else:
                image, label, *_ = base[at]
                image = image.convert(self.mode)
        except _UNREADABLE as error:
            return None, -1, (_filename(base, at), first_line(error))
        return self.transform(image), -1 if label is None else int(label), None


def _collate(
    items: list[tuple[torch.Tensor | None, int, tuple[str, str] | None]],
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, str]]:
    good = [(image, label) for image, label, _ in items if image is not None]
    skipped = dict(problem for *_, problem in items if problem is not None)
    if not good:
        return None, None, skipped
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good]), skipped


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
        config: overrides of the data config: input_size, img_size, mean, std, interpolation, crop_pct, crop_mode.

    Raises:
        ArgumentError: the path does not exist.
        DataError: no images, or labels that do not fit the model.

    >>> from normswap.demo import FOLDER, MODEL
    >>> images = load_images(normswap.load_model(MODEL), FOLDER, "train")
    >>> images.description, images.num_classes, images.input_size
    ('320 images of demo/train.tar', 10, (3, 32, 32))
    >>> batch, labels = next(iter(images.draw(5, seed=0)))
    >>> batch.shape, labels.shape
    (torch.Size([5, 3, 32, 32]), torch.Size([5]))
    """
    overrides = {k: v for k, v in config.items() if v is not None}
    try:
        data_config = resolve_input_data_config(model, args=overrides)
        transform = create_transform(**data_config, is_training=False)
    except (AssertionError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ArgumentError(f"no transform can be made of {overrides}: {type(error).__name__}: {error}") from error
    channels = data_config["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"the model takes {channels} channels; images are read with 1 or 3")
    root = None if data_dir is None else Path(data_dir)
    if not dataset:
        if root is None:
            raise ArgumentError("which images? Give `data_dir` or `dataset`")
        root = _split_or_root(root, split)
    elif not dataset.startswith("hfds/") and root is None:
        raise ArgumentError(f"`dataset` {dataset} also needs `data_dir`, the folder it lies in")
    mode = "L" if channels == 1 else "RGB"
    found = _create(dataset, root, split, class_map, mode)
    expected = getattr(model, "num_classes", 0)
    classes = _num_classes(found) if labels else None
    if labels and isinstance(found, Stream) and expected:
        classes = classes or expected  # checked with every batch
    where = f"{dataset or root} ({split})" if dataset else str(root)
    if classes is not None and expected and classes != expected:
        raise DataError(
            f"{where} has {classes} classes and the model has {expected}: give `class_map`, or `labels=False` to "
            f"compare with the original only"
        )
    short = where if dataset or root is None else f"{root.resolve().parent.name}/{root.name}"
    description = f"{len(found)} images of {short}"
    return ImageSet(
        found,
        transform,
        description,
        classes,
        tuple(data_config["input_size"]),
        mode,
        batch_size,
        workers,
        max_skipped,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )


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
        ArgumentError, DataError, first_line: see `load_images`.
    """
    if dataset or data_dir is None:
        names = [train_split, split]
    else:
        roots = {name: _split_or_root(Path(data_dir), name) for name in (train_split, split)}
        names = [name for name, root in roots.items() if root != Path(data_dir)] or [split]
    evaluation = load_images(model, data_dir, names[-1], dataset, **options)
    if names[0] == names[-1]:
        return evaluation, evaluation
    if not train_labels:
        options["labels"] = False
    return load_images(model, data_dir, names[0], dataset, **options), evaluation


def _split_or_root(root: Path, split: str) -> Path:
    found = find_split(root, split)
    if found is None and split not in (*_TRAIN, *_EVAL):  # a folder without splits has none of the usual ones either
        raise ArgumentError(f"{root}: no split {split!r}, neither as a folder nor as {split}.tar")
    return found or root


def find_split(root: Path, split: str) -> Path | None:
    """Return the folder or .tar of a split below ``root`` under any of timm's names for it, None if there is none.

    Raises:
        ArgumentError: ``root`` does not exist.
    """
    if not root.exists():
        raise ArgumentError(f"{root}: no such folder or tar file")
    names = next((group for group in (_TRAIN, _EVAL) if split in group), ())
    for name in dict.fromkeys((split, *names)):
        for candidate in (root / name, root / f"{name}.tar"):
            if root.is_dir() and candidate.exists():
                return candidate
    return None


def _create(dataset: str, root: Path | None, split: str, class_map: str | None, mode: str) -> Any:
    where = f"{dataset or root}"
    try:
        found = create_dataset(
            dataset,
            root=None if root is None else str(root),
            split=split,
            search_split=False,
            class_map=class_map,  # type: ignore[arg-type]  # timm takes a file name as well
            input_img_mode=mode,
        )
    except ImportError as error:
        raise DataError(f"{where}: timm needs another package for it: {error}") from error
    except Exception as error:  # timm's readers raise RuntimeError, ValueError and AssertionError for "no images"
        empty = "not enough values to unpack" in str(error)
        raise DataError(f"{where}: no images in it" if empty else f"{where}: {first_line(error)}") from error
    if not isinstance(found, IterableDataset):
        return found
    if len(found) == 0:  # type: ignore[arg-type]  # timm's has a length
        raise DataError(
            f"{where}: the stream does not say how many images it has; for wds/ write that into _info.json, or behind "
            f"`split`, for example 'val-{{0000..0007}}.tar|5000'"
        )
    return Stream(found)


def _num_classes(dataset: Any) -> int | None:
    """Return how many classes the labels have; None for a flat folder, whose only class says nothing."""
    count = len(_classes(dataset))
    return count if count > 1 else None


def _classes(dataset: Any) -> list[str]:
    """Return the names of the classes in the order of the labels."""
    reader = getattr(dataset, "reader", dataset)
    for name in ("class_to_idx", "class_name_to_idx", "classes"):
        classes = getattr(reader, name, None)
        if classes:
            names = sorted(classes, key=lambda c: classes[c]) if isinstance(classes, dict) else classes
            return [str(name) for name in names]
    return []
