"""Keep the live values of every batch in memory as far as a budget goes, the rest on disk."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .errors import ArgumentError, OutputError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Return the number of bytes in ``text``, as "512M", "8G" or "2.5 GiB".

    Raises:
        ArgumentError: it is no size above zero.
    """
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ArgumentError(f"{text!r} is no memory size: write it as 512M or 8G")
    return size


def default_budget() -> int:
    """Return half of the memory that is free now, in bytes; 4 GiB where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


class Store:
    """One dictionary of values per batch. Batches are visited in turn, so the first ones stay and the rest go to disk.

    (Dropping the least recently used one would drop, in a cycle, always the one needed next.)

    Args:
        budget: bytes that the values at rest may take in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.resident: dict[int, tuple[int, dict[str, Any]]] = {}
        self.on_disk: set[int] = set()
        self.folder: Path | None = None
        self.peak = 0

    def put(self, index: int, values: dict[str, Any]) -> None:
        """Keep the values of one batch until they are taken.

        Raises:
            ArgumentError: they alone are larger than the budget.
            OutputError: they do not fit on the disk either.
        """
        size = _bytes(values)
        if size > self.budget:
            raise ArgumentError(
                f"--memory-budget {_human(self.budget)} is too small: one batch of activations takes {_human(size)}"
            )
        used = sum(size for size, _ in self.resident.values())
        if used + size <= self.budget:
            self.resident[index] = (size, values)
            self.peak = max(self.peak, used + size)
            return
        self.on_disk.add(index)
        try:
            torch.save(values, self._file(index))
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            raise OutputError(
                f"{self.folder or tempfile.gettempdir()}: activations beyond the memory budget cannot be written "
                f"({str(error).splitlines()[0]}): give a larger --memory-budget, or a larger disk with TMPDIR"
            ) from error

    def take(self, index: int) -> dict[str, Any]:
        """Give back the values of one batch."""
        if index in self.on_disk:
            self.on_disk.discard(index)
            return torch.load(self._file(index), weights_only=True)
        return self.resident.pop(index, (0, {}))[1]

    def close(self) -> None:
        """Delete what is on disk."""
        self.resident.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _file(self, index: int) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="normswap-"))
        return self.folder / f"{index}.pt"


def _bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        return sum(_bytes(value) for value in values.values())
    return sum(_bytes(value) for value in values) if isinstance(values, list | tuple) else 0


def _human(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
