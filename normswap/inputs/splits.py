"""How a data set lies on disk: which folder or .tar is which split."""

import os
import re
from pathlib import Path

from ..errors import ArgumentError, DataError
from .image_files import SUFFIXES, TAKEN, archive_suffix

# timm's synonyms, in the order in which they are looked for; images for testing come last, their labels may be secret.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_EVAL = ("validation", "val", "valid", "eval", "evaluation", *_TEST)
_WORDS = re.compile(rf"(?<![a-z])({'|'.join((*_TRAIN, *_EVAL))}|dev|holdout)(?![a-z])")
# Splits are few. In a folder of many folders these are classes, and looking into each takes long.
_MOST_SPLITS = 10
_NAMED = 8


def find_split(root: Path, split: str) -> Path | None:
    """Return the folder or .tar of a split below ``root`` under any of its usual names, in any case; None without.

    Raises:
        ArgumentError: ``root`` does not exist.
        DataError: ``root`` is an archive that is not taken.
    """
    if not root.exists():
        raise ArgumentError(f"{root}: no such folder or tar file")
    if root.is_file():
        if root.suffix != ".tar":
            raise DataError(f"{root}: {archive_suffix(root) or root.suffix or 'such a file'} is not taken; {TAKEN}")
        return None
    parts = _parts(root)
    for name in _names(split):
        # A folder goes before a .tar, and the spelling that was asked for before others.
        found = sorted(
            (part for part in parts if _stem(part).lower() == name.lower()),
            key=lambda part: (part.is_file(), _stem(part) != name, part.name),
        )
        if found and not (name in (*_TRAIN, *_EVAL) and _is_class(found[0], parts)):
            return found[0]
    return None


def split_root(root: Path, split: str, parameter: str = "split") -> Path:
    """Return where a split lies: its folder or .tar, the only split that is there, or ``root`` if it has no splits.

    Args:
        root: a data set.
        split: the name of the split.
        parameter: by which the caller was told that name.

    Raises:
        ArgumentError: no such path; there are splits, and which one is meant cannot be told.
        DataError: the split is an archive that is not taken.
    """
    found = find_split(root, split)
    if found is not None or root.is_file():
        return found or root
    _refuse_archive(root, split)
    others = _lookalikes(root)
    if split.lower() not in (*_TRAIN, *_EVAL):  # a folder without splits has none of the usual ones either
        what = f"; there are {_listed(others or _parts(root))}" if _parts(root) else ""
        raise ArgumentError(f"{root}: no split {split!r}, neither as a folder nor as {split}.tar{what}")
    if len(others) == 1 and others[0] in (find_split(root, "train"), find_split(root, "validation")):
        return others[0]
    if others:
        raise ArgumentError(
            f"{root}: which is the {split} split? There are {_listed(others)}: name one as `{parameter}`"
        )
    return root


def split_roots(root: Path, train_split: str, split: str) -> tuple[Path, Path]:
    """Return where calibration and evaluation images lie; twice the same where there is one split only.

    Raises:
        ArgumentError, DataError: see `split_root`.
    """
    named = {split: find_split(root, split) for split in (train_split, split)}
    there = {path for path in named.values() if path is not None}
    if len(there) == 1 and there >= set(_lookalikes(root)):
        for name in named:
            if named[name] is None:
                _refuse_archive(root, name)
        (only,) = there
        return only, only
    return split_root(root, train_split, "train_split"), split_root(root, split)


def _refuse_archive(root: Path, split: str) -> None:
    """Raise `DataError` if the split is there, packed."""
    names = [name.lower() for name in _names(split)]
    for file in _entries(root, folders=False):
        suffix = archive_suffix(file)
        if suffix and file.name.lower().removesuffix(suffix) in names:
            raise DataError(f"{file}: {suffix} is not taken; {TAKEN}")


def is_called(path: Path, split: str) -> bool:
    """Return whether a folder or .tar has one of the usual names of a split.

    >>> is_called(Path("data/Val"), "validation")
    True
    """
    name = path.name.lower()
    return name.removesuffix(".tar") in [name.lower() for name in _names(split)]


def _names(split: str) -> tuple[str, ...]:
    """Return the names to look for, the one that was asked for first."""
    group: tuple[str, ...] = next((group for group in (_TRAIN, _TEST, _EVAL) if split.lower() in group), ())
    return tuple(dict.fromkeys((split, *group)))


def _entries(root: Path, folders: bool) -> list[Path]:
    """Return the folders or the files of a folder, hidden ones left out, by name; asks nothing of each by itself."""
    with os.scandir(root) as entries:
        return sorted(
            root / entry.name for entry in entries if entry.is_dir() == folders and not entry.name.startswith(".")
        )


def _parts(root: Path) -> list[Path]:
    """Return what can be a split: folders and .tar files."""
    tars = [path for path in _entries(root, folders=False) if path.suffix.lower() == ".tar"]
    return sorted([*_entries(root, folders=True), *tars])


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() == ".tar" and path.is_file() else path.name


def _is_class(path: Path, parts: list[Path]) -> bool:
    """Return whether a folder that is called like a split is one of many classes, as "train" may be."""
    if path.is_file() or _folders(path):
        return False
    others = [other for other in parts if other.is_dir() and not _WORDS.search(_stem(other).lower())]
    return any(_holds_images(other) for other in others)


def _lookalikes(root: Path) -> list[Path]:
    """Return the parts that look like splits: by a word in their names, or since they have the same folders inside."""
    parts = _parts(root)
    if len(parts) > _MOST_SPLITS:
        return []
    inside = {part: _folders(part) for part in parts if part.is_dir()}
    alike = {a for a in inside for b in inside if a != b and len(inside[a] & inside[b]) > 1}
    named = {part for part in parts if _WORDS.search(_stem(part).lower()) and not _is_class(part, parts)}
    return [part for part in parts if part in alike | named]


def _folders(path: Path) -> set[str]:
    return {inner.name for inner in _entries(path, folders=True)}


def _holds_images(path: Path) -> bool:
    return any(inner.suffix.lower() in SUFFIXES for inner in path.iterdir())


def _listed(parts: list[Path]) -> str:
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return ", ".join(part.name for part in parts[:_NAMED]) + more
