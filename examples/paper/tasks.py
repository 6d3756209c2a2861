"""What is learnt: the images, the model's shape and how it is trained, for each of the two data sets."""

import gzip
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run besides variant, learning rate, depth and seed; stored with the results.

    Attributes:
        train_images: the first so many of those there are.
        test_images: the first so many of those there are.
        warmup: share of the updates in which the learning rate rises in a line.
        last_updates: the final loss is the mean over so many updates, each before its own step.
        min_top1: a run that ends below has diverged.
        hflip: how likely a training image is mirrored.
        scale: least share of a training image's area that a random crop keeps.
        mean, std: of the normalisation.
    """

    train_images: int = 16384
    test_images: int = 10000
    epochs: int = 3
    batch: int = 128
    weight_decay: float = 0.05
    warmup: float = 0.1
    last_updates: int = 20
    min_top1: float = 20.0
    hflip: float = 0.0
    scale: float = 1.0
    mean: float = 0.286
    std: float = 0.353


@dataclass(frozen=True)
class Data:
    """Images `[N, C, H, W]` and labels `[N]`, normalised."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: str) -> "Data":
        """Return the same on a device."""
        return Data(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        name: what the results call it.
        title: what the report calls it.
        source: where the images come from, for people.
        folder: where they are if nothing else is said.
        shape: arguments of timm's `VisionTransformer`.
        recipe: how it is trained.
        rates: learning rates of the grid.
        load: reads the images from a folder.
    """

    name: str
    title: str
    source: str
    folder: Path
    shape: dict[str, Any]
    recipe: Recipe
    rates: tuple[float, ...]
    load: Callable[[Path, Recipe], Data]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.shape["in_chans"], self.shape["img_size"], self.shape["img_size"]


def read_idx(path: Path) -> Tensor:
    """Return the bytes of an idx file (two zeros, type 8, the number of dimensions, the dimensions, the data)."""
    try:
        content = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise click.ClickException(
            f"{path}: {error.strerror or error}; apt-get install dataset-fashion-mnist, or pass --data-dir"
        ) from error
    if content[:3] != b"\0\0\x08":
        raise click.ClickException(f"{path}: no idx file of bytes; take Fashion-MNIST's own")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return torch.frombuffer(bytearray(content[4 + 4 * len(shape) :]), dtype=torch.uint8).reshape(shape)


def load_idx(folder: Path, recipe: Recipe) -> Data:
    """Return the images that the recipe names, from four idx files."""

    def part(name: str, count: int) -> tuple[Tensor, Tensor]:
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:count]  # [N, 28, 28]
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")[:count]
        return ((images.float() / 255 - recipe.mean) / recipe.std).unsqueeze(1), labels.long()  # [N, 1, 28, 28]

    return Data(*part("train", recipe.train_images), *part("t10k", recipe.test_images))


def load_tars(folder: Path, recipe: Recipe) -> Data:
    """Return the images that the recipe names, from train.tar and validation.tar with a folder for each class."""

    def part(name: str, count: int) -> tuple[Tensor, Tensor]:
        path = folder / f"{name}.tar"
        try:
            with tarfile.open(path) as tar:
                # In the same order for everyone, and every class in its first images.
                files = sorted(filter(tarfile.TarInfo.isfile, tar), key=lambda m: (Path(m.name).name, m.name))
                classes = sorted({Path(member.name).parent.name for member in files})
                chosen = files[:count]
                pixels = [numpy.asarray(Image.open(tar.extractfile(member)).convert("RGB")) for member in chosen]  # type: ignore
            stacked = numpy.stack(pixels)  # [N, H, W, C]; there are some, and all of one size
        except (OSError, ValueError, tarfile.TarError) as error:
            raise click.ClickException(f"{path}: {error}; pass --data-dir") from error
        images = torch.from_numpy(stacked).permute(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]
        labels = torch.tensor([classes.index(Path(member.name).parent.name) for member in chosen])
        return (images.float() / 255 - recipe.mean) / recipe.std, labels

    return Data(*part("train", recipe.train_images), *part("validation", recipe.test_images))


FASHION = Task(
    "fashion",
    "Fashion-MNIST",
    "Fashion-MNIST (Debian package `dataset-fashion-mnist`)",
    Path("/usr/share/datasets/fashion-mnist"),
    {"img_size": 28, "in_chans": 1, "patch_size": 7, "embed_dim": 64, "num_heads": 4, "num_classes": 10},
    Recipe(),
    (3e-3, 3e-2, 1.0),
    load_idx,
)
PHOTOS = Task(
    "photos",
    "photos",
    "photos of ten classes, 32x32 pixels, re-encoded as JPEG (CIFAR-10's, of which these are a part)",
    Path("../shared/data/cifar10"),
    {"img_size": 32, "in_chans": 3, "patch_size": 4, "embed_dim": 128, "num_heads": 4, "num_classes": 10},
    Recipe(train_images=20000, test_images=5000, epochs=20, batch=512, hflip=0.5, scale=0.6, mean=0.473, std=0.251),
    (1e-3, 3e-3, 3e-2),
    load_tars,
)
TASKS = {task.name: task for task in (FASHION, PHOTOS)}
