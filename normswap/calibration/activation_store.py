"""Keep the live values of every batch on their GPU as far as that goes, in memory up to a budget, the rest on disk."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, OutputError, first_line

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
        budget: bytes that the values at rest may take in memory. On a GPU they may take as many, and at most half of
            what was free there when the first came.

    Attributes:
        peak: most bytes that were in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.gpu_budget: int | None = None
        self.resident: dict[int, tuple[int, dict[str, Any]]] = {}
        self.on_gpu: dict[int, tuple[int, dict[str, Any]]] = {}
        self.on_disk: set[int] = set()
        self.device = torch.device("cpu")
        self.folder: Path | None = None
        self.peak = 0

    def put(self, index: int, values: dict[str, Any]) -> None:
        """Keep the values of one batch until they are taken.

        Raises:
            ArgumentError: they alone are larger than the budget.
            OutputError: they do not fit on the disk either.
        """
        size = _bytes(values)
        self.device = next((tensor.device for tensor in _tensors(values)), self.device)
        if self._fits_on_gpu(size):
            self.on_gpu[index] = (size, values)
            return
        if size > self.budget:
            raise ArgumentError(
                f"`memory_budget` {_human(self.budget)} is too small: one batch of activations takes {_human(size)}"
            )
        used = sum(size for size, _ in self.resident.values())
        values = moved(values, torch.device("cpu"))
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
                f"({first_line(error)}): give a larger `memory_budget`, or a larger disk with TMPDIR"
            ) from error

    def take(self, index: int) -> dict[str, Any]:
        """Give back the values of one batch."""
        if index in self.on_gpu:
            return self.on_gpu.pop(index)[1]
        if index in self.on_disk:
            self.on_disk.discard(index)
            return moved(torch.load(self._file(index), weights_only=True), self.device)
        return moved(self.resident.pop(index, (0, {}))[1], self.device)

    def _fits_on_gpu(self, size: int) -> bool:
        if self.device.type == "cpu":
            return False
        if self.gpu_budget is None:
            self.gpu_budget = min(self.budget, _free_on(self.device) // 2)
        return sum(size for size, _ in self.on_gpu.values()) + size <= self.gpu_budget

    def close(self) -> None:
        """Delete what is on disk."""
        self.resident.clear()
        self.on_gpu.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _file(self, index: int) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="normswap-"))
        return self.folder / f"{index}.pt"


def _free_on(device: torch.device) -> int:
    """Return how many bytes are free on an accelerator; none where it does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def moved(values: Any, device: torch.device) -> Any:
    """Return the same with every tensor on a device."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {key: moved(value, device) for key, value in values.items()}
    if isinstance(values, list | tuple):
        items = [moved(value, device) for value in values]
        return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)  # a namedtuple is called so
    return values


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _bytes(values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(values))


def _human(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
