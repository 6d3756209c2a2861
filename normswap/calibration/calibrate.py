"""Set every BatchNorm from unlabelled images, and re-solve the layers around them, in the order the model runs.

At each stop both models have seen all images up to there, the converted one with everything before already set. So
every norm and every layer is fitted to what the converted model really feeds it and to what the original gives.
"""

from bisect import bisect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, CalibrationError
from ..inputs.batches import BATCH_SIZE, rebatched
from ..layers import TokenBatchNorm
from ..model_utils import eval_mode, find_module
from ..progress import Progress, no_progress
from ..records.report import Calibration
from ..surgery.swap import batch_norms
from .activation_store import default_budget
from .estimators import METHODS
from .lockstep import Lane, Lockstep, Observer, Stop
from .moments import CACHED_ROWS, Moments
from .reconstruction import HELD_OUT, ROWS_KEPT, Reconstruction, drawn
from .solvable_layers import Readers, Writer, find_readers, find_writers

RECONSTRUCT = ("all", "readers")


class _MapObserver(Observer):
    """Measures what passes a BatchNorm that stays the map it is: one between an FFN's layers, or behind a writer.

    Args:
        path, norm: the BatchNorm.
        batches: how many all processes have together, if a random part of the rows is enough; None to take all.
    """

    def __init__(self, path: str, norm: TokenBatchNorm, batches: int | None = None) -> None:
        self.path, self.norm, self.moments, self.batches = path, norm, Moments(), batches

    def __call__(self, x: torch.Tensor, number: int) -> None:
        rows = _tokens(x, self.norm)
        if self.batches is not None:
            (rows,) = drawn(number, ROWS_KEPT, self.batches, rows)
        for part in rows.split(CACHED_ROWS):
            self.moments.update(part)

    def solve(self) -> None:
        """Take the statistics as running mean and variance, and a weight and bias that keep the map."""
        self.moments.reduce()
        if not self.moments.finite:
            raise CalibrationError(
                f"{self.path}: statistics are not finite; an image or a weight gives NaN or infinity there"
            )
        scale, shift = self.norm.affine64()
        self.norm.set_statistics(self.moments.mean, self.moments.var)
        self.norm.set_affine(scale, shift)


@torch.no_grad()
def calibrate(
    swapped: nn.Module,
    images: Iterable[Any],
    original: nn.Module,
    method: str = "reconstruct",
    reconstruct: str = "all",
    memory_budget: int | None = None,
    refine_steps: int | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """Set every BatchNorm of ``swapped``, in place, and with "reconstruct" the linear layers around them too.

    Runs in eval mode (dropout and drop path off), needs no labels, and gives the same numbers however the images
    are batched. Under an initialised torch.distributed every process passes the same images, works on its share of
    them, and ends with the same model.

    Args:
        swapped: from `swap_norms`; changed in place.
        images: any iterable of batches `[B, C, H, W]`, or of tuples or lists that start with one.
        original: the model it was swapped from; stays as it is.
        method: "reconstruct", "channel" or "moments".
        reconstruct: "all" re-solves the layers that read a norm and those that write to the residual stream,
            "readers" the first only. Other methods do not look at it.
        memory_budget: bytes that activations at rest may take in memory, the rest goes to disk; default: half of
            what is free. On a GPU as many may stay there, up to half of what is free there.
        refine_steps: gradient steps, of 32 images each, for what every attention reads, where writers are re-solved
            too; 0 for none. Default: one on every batch that is fitted to, but at least 28. More of them bring the
            answers nearer to the original's and cost time, see docs/calibration.md.
        progress: called with ("calibrate: the module's path", stops done, stops in all), at the end with "calibrate".

    Raises:
        ArgumentError: unknown method, negative steps, no BatchNorm to set, no images, or a memory budget below one
            batch.
        CalibrationError: statistics of a site are not finite.
    """
    check_method(method, reconstruct, refine_steps)
    norms = batch_norms(swapped)
    sites = [path for path in norms if isinstance(find_module(original, path), nn.LayerNorm)]
    if not sites:
        raise ArgumentError(f"{type(swapped).__name__} has no BatchNorm where the original has a LayerNorm: swap first")
    observers = {path: _MapObserver(path, norm) for path, norm in norms.items() if path not in sites}
    weight = next(original.parameters())
    batches = (batch.to(weight) for batch in shuffled(images, BATCH_SIZE))
    budget = default_budget() if memory_budget is None else memory_budget
    with (
        eval_mode(original, swapped),
        Lockstep(original, swapped, sites, batches, dict(observers), budget) as lockstep,
    ):
        if lockstep.first is None:
            raise ArgumentError("no images to calibrate on")
        lane = lockstep.first[1]
        batches_seen = lockstep.count if method == "reconstruct" else None
        for observer in observers.values():
            observer.batches = batches_seen
        steps = refine_steps if reconstruct == "all" else 0  # what is refined is seen where the branch's writer ends
        work = Reconstruction(lockstep, method, original, norms, steps)
        readers = find_readers(lane, sites) if method == "reconstruct" else []
        writers = find_writers(lane, sites) if method == "reconstruct" and reconstruct == "all" else []
        stops = [lane.at(Stop(path)) for path in sites] + [lane.at(stop) for group in readers for stop in group.stops]
        writers = [w for w in writers if not _crossed(lane, w, stops)]
        agenda = _agenda(lane, sites, readers, writers)
        for i, (_, item) in enumerate(agenda):
            progress(f"calibrate: {_where(item)}", i, len(agenda))
            if isinstance(item, Readers):
                work.solve_readers(item, writers)
            elif isinstance(item, Writer):
                for path in item.sites:  # its statistics change with the writer, its map does not
                    lockstep.observers[path] = observers[path] = _MapObserver(path, norms[path], batches_seen)
                work.solve_writer(item)
            else:
                work.set_norm(item, next((w for w in writers if item in w.sites), None))
        lockstep.finish()
        for observer in observers.values():
            observer.solve()
        progress("calibrate", len(agenda), len(agenda))
    return work.result


def check_method(method: str, reconstruct: str, refine_steps: int | None) -> None:
    """Refuse what cannot be meant.

    Raises:
        ArgumentError: unknown method or choice of layers, or a negative number of steps.
    """
    if refine_steps is not None and refine_steps < 0:
        raise ArgumentError(f"refine_steps must not be negative, not {refine_steps}")
    if method not in METHODS:
        raise ArgumentError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if reconstruct not in RECONSTRUCT:
        raise ArgumentError(f"reconstruct is one of {', '.join(RECONSTRUCT)}, not {reconstruct!r}")


def _crossed(lane: Lane, writer: Writer, stops: list[int]) -> bool:
    """Return whether something else has to be set before a writer's output joins the residual stream."""
    own = {lane.at(Stop(path)) for path in writer.sites} | {lane.at(writer.stop), lane.at(writer.end)}
    return any(lane.at(writer.stop) < at < lane.at(writer.end) for at in stops if at not in own)


def _agenda(lane: Lane, sites: list[str], readers: list[Readers], writers: list[Writer]) -> list[tuple[float, Any]]:
    """Return everything to set, in the order in which the converted model runs it."""
    agenda: list[tuple[float, Any]] = [(lane.at(writer.stop), writer) for writer in writers]
    for path in sites:
        # A norm behind a writer is set first: the writer's target is seen through it.
        behind = [lane.at(writer.stop) - 0.5 for writer in writers if path in writer.sites]
        agenda.append((behind[0] if behind else lane.at(Stop(path)), path))
    written = {writer.stop for writer in writers}
    others = sorted(at for at, _ in agenda)
    for group in readers:
        # Readers of one value go together as far as nothing else has to be set between them.
        together: dict[int, list[Stop]] = {}
        for stop in group.stops:
            if stop not in written:
                together.setdefault(bisect(others, lane.at(stop)), []).append(stop)
        for stops in together.values():
            agenda.append((lane.at(stops[0]), Readers(tuple(stops), group.sites)))
    return sorted(agenda, key=lambda entry: entry[0])


def _where(item: Any) -> str:
    return item if isinstance(item, str) else (item.stop if isinstance(item, Writer) else item.stops[0]).path


def shuffled(images: Iterable[Any], size: int) -> Iterator[torch.Tensor]:
    """Yield the images `[B, C, H, W]` in batches of ``size`` or less, in a random order, always the same.

    Folders are read class by class. In that order the images held out would be of other classes than those fitted to.
    """
    found = [image for batch in rebatched(images, size) for image in batch]
    # Few images make small batches, so that some are held out; a size that divides their number saves an export.
    size = max(1, min(size, len(found) // HELD_OUT))
    size = min(range(size, size - size // 4 - 1, -1), key=lambda n: len(found) % n > 0)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).split(size)
    for indices in order if found else ():
        yield torch.stack([found[index] for index in indices.tolist()])  # [C, H, W] each -> [B, C, H, W]


def _tokens(x: torch.Tensor, norm: TokenBatchNorm) -> torch.Tensor:
    return x.movedim(norm.channel_dim, -1).reshape(-1, norm.num_features)  # [..., C] -> [M, C]
