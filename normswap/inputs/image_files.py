"""Image files: which of them are read, which are left, and pixels of any width brought to 8 bits."""

import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from torch.utils.data import Dataset, Subset

from ..errors import DataError, first_line

# What Pillow decodes without other programs; timm by itself takes the first three.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".apng"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".tga", ".pcx"),
)
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".gz", ".7z", ".rar")
TAKEN = "a folder or an uncompressed .tar is taken: unpack it"
# timm itself keeps what it found in larger tars, not to go through them twice.
_LARGEST_SCAN = 10 * 2**30
_WIDE = ("I", "F")
_EXTENSIONS = threading.Lock()

Item = tuple[torch.Tensor | None, int, tuple[str, str] | None]


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in ``mode``, "RGB" or "L", where Pillow would clip wider pixels to white.

    16 bits are scaled by 1/257. Integers of 32 bits are taken as 8 bits or 16, floats as 0..1 or 0..255, whichever
    they fit.

    Raises:
        ValueError: values that fit neither.
    """
    if not image.mode.startswith(_WIDE):
        return image.convert(mode)
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        scale, fits = (255.0 if high <= 1 else 1.0), low >= 0 and high <= 255
        expected = "0..1 or 0..255"
    else:
        # Pillow reads the 16 bits of a .pgm into 32.
        is_16 = image.mode != "I" or image.format == "PPM" or high > 255
        scale, fits, expected = (1 / 257 if is_16 else 1.0), low >= 0 and high <= 65535, "0..65535"
    if not fits:  # neither does NaN
        raise ValueError(f"pixels of mode {image.mode} from {low:g} to {high:g}, not {expected}")
    return Image.fromarray((values * scale).round().astype(np.uint8)).convert(mode)


def open_rgb(path: Any) -> Image.Image:
    """Read a file for torchvision's datasets, whose own loader clips."""
    with Image.open(path) as image:
        return to_8_bits(image, "RGB")


@contextmanager
def all_suffixes() -> Iterator[None]:
    """Let timm's readers find every file that Pillow decodes, not only .png and .jpg; for as long as they look."""
    with _EXTENSIONS:
        before = get_img_extensions()
        set_img_extensions(tuple(dict.fromkeys((*before, *SUFFIXES))))
        try:
            yield
        finally:
            set_img_extensions(before)


def archive_suffix(path: Path) -> str | None:
    """Return the suffix of an archive that is not taken, None for anything else.

    >>> archive_suffix(Path("train.tar.gz")), archive_suffix(Path("train.tar"))
    ('.tar.gz', None)
    """
    return next((suffix for suffix in ARCHIVES if path.name.lower().endswith(suffix)), None)


@dataclass(frozen=True)
class FileCount:
    """How many files of each suffix were read, and how many lie beside them unread."""

    read: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Return both in one line.

        >>> FileCount(Counter({".png": 60}), Counter({".heic": 2, "": 1})).line()
        '60 .png read; not read: 2 .heic, 1 without suffix'
        """
        return f"{_counted(self.read) or 'nothing'} read; not read: {_counted(self.left) or 'nothing'}"


def _counted(counts: Counter[str]) -> str:
    order = sorted(counts.items(), key=lambda item: (-item[1], not item[0], item[0]))
    return ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in order)


def count_files(root: Path, reader: Any = None) -> FileCount:
    """Count the files below a folder or in a .tar by suffix; nothing is counted in a very large .tar.

    Args:
        root: the folder or .tar.
        reader: timm's, which knows which of them it reads; default: none of them.
    """
    if root.is_file() and (root.suffix != ".tar" or root.stat().st_size > _LARGEST_SCAN):
        return FileCount()
    there = _by_suffix(_names(root))
    samples = () if reader is None else getattr(reader, "samples", ())
    read = Counter({suffix: count for suffix, count in there.items() if suffix in SUFFIXES})
    if read.total() != len(samples):  # a class map, or a reader of its own, leaves some images out
        # A sample is a path, or the entry of a .tar and the .tar it lies in.
        read = _by_suffix(sample[0] if isinstance(sample[0], str) else sample[0].name for sample in samples)
    return FileCount(read, there - read)


def _by_suffix(names: Iterable[str]) -> Counter[str]:
    exact = Counter(os.path.splitext(name)[1] for name in names)
    counts: Counter[str] = Counter()
    for suffix, count in exact.items():
        counts[suffix.lower()] += count
    return counts


def _names(root: Path) -> Iterator[str]:
    if root.is_dir():
        for _, _, files in os.walk(root, followlinks=True):  # as timm walks
            yield from files
        return
    with tarfile.open(root) as tar:
        for entry in tar:
            if not entry.isfile():
                continue
            if not entry.name.lower().endswith(".tar"):
                yield entry.name
                continue
            with tarfile.open(fileobj=tar.extractfile(entry)) as inner:  # timm reads one level of them
                yield from (within.name for within in inner if within.isfile())


class ReadableImages(Dataset[Item]):
    """Gives (image, label, None), or (None, -1, (name, reason)) for an image that cannot be read.

    Args:
        dataset: a timm or torchvision dataset without transform, or a subset of one.
        transform: makes a tensor of an image.
        mode: PIL's name of the channels, "RGB" or "L".
    """

    def __init__(self, dataset: Any, transform: Any, mode: str) -> None:
        self.dataset, self.transform, self.mode = dataset, transform, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        base: Any = self.dataset
        at = index
        if isinstance(base, Subset):
            base, at = base.dataset, base.indices[index]
        try:
            if hasattr(base, "reader"):  # timm's own __getitem__ would put the next image in the place of a broken one
                stream, label, *_ = base.reader[at]
                with stream:
                    image = to_8_bits(Image.open(stream), self.mode)
            else:
                image, label, *_ = base[at]
                image = to_8_bits(image, self.mode)
            return self.transform(image), -1 if label is None else int(label), None
        except Exception as error:  # codecs raise what they like; one file must not end the run without its name
            return None, -1, (filename(base, at), first_line(error))


def filename(dataset: Any, index: int) -> str:
    """Return the name of the image at ``index``; "image 17" where the reader has no names."""
    if isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        return str(dataset.filename(index))
    except (AttributeError, AssertionError, KeyError, TypeError, NotImplementedError):
        pass
    samples = getattr(dataset, "samples", None)  # torchvision's folders
    return str(samples[index][0]) if isinstance(samples, list) else f"image {index}"


def collate(items: list[Item]) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, str]]:
    """Return images `[B, C, H, W]` and labels `[B]` of those that could be read, and why others could not, by name."""
    good = [(image, label) for image, label, _ in items if image is not None]
    skipped = dict(problem for *_, problem in items if problem is not None)
    if not good:
        return None, None, skipped
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good]), skipped


def loaded(loader: Any, description: str) -> Iterator[Any]:
    """Yield what a loader gives; whatever ends it early, in this process or in a worker, becomes one line.

    Raises:
        DataError: names the images and the reason.
    """
    batches: Iterator[Any] | None = None
    while True:
        try:
            batches = iter(loader) if batches is None else batches  # an iterator may have no length to be true by
            batch = next(batches)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"reading {description} ended early: {_reason(error)}") from error
        yield batch


def _reason(error: Exception) -> str:
    """Return kind and first line of an error; torch passes a worker's whole traceback on as the text of its own."""
    text = str(error)
    if not text.startswith("Caught "):
        return f"{type(error).__name__}: {first_line(error)}"
    frame = text.rpartition("\n  File ")[2].splitlines()[1:]
    return next((line for line in frame if line and not line.startswith(" ")), first_line(error))
