"""Set every BatchNorm from unlabelled images, and re-solve the layers around them, in the order the model runs.

At each stop both models have seen all images up to there, the converted one with everything before already set. So
every norm and every layer is fitted to what the converted model really feeds it and to what the original gives.
"""

from bisect import bisect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..ambient import known_context, thaw, thawed
from ..errors import ArgumentError, CalibrationError
from ..inputs.batches import ImageBatches
from ..layers import TokenBatchNorm
from ..model_utils import eval_mode, find_module
from ..module_state import check_state, check_weights
from ..progress import Progress, no_progress
from ..records.report import Calibration
from ..surgery.swap import batch_norms
from .activation_store import default_budget
from .bounds import NONE, Bounds
from .lockstep import Lane, Lockstep, Observer, Stop
from .moments import CACHED_ROWS, Moments
from .options import CalibrationOptions
from .reconstruction import ROWS_KEPT, Reconstruction, drawn
from .solvable_layers import Readers, Writer, find_readers, find_writers
from .views import with_views


class _MapObserver(Observer):
    """Measures what passes a BatchNorm that stays the map it is: one between an FFN's layers, or behind a writer.

    Args:
        path, norm: the BatchNorm.
        batches: how many all processes have together, if a random part of the rows is enough; None to take all.
    """

    def __init__(self, path: str, norm: TokenBatchNorm, batches: int | None = None) -> None:
        self.path, self.norm, self.moments, self.batches = path, norm, Moments(), batches

    def __call__(self, x: torch.Tensor, number: int) -> None:
        rows = self.norm.tokens(self.norm.bounded(x))
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


@known_context()
@torch.no_grad()
def calibrate(
    swapped: nn.Module,
    images: Iterable[Any],
    original: nn.Module,
    options: CalibrationOptions | None = None,
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
        options: see `CalibrationOptions`.
        progress: called with ("calibrate: the module's path", stops done, stops in all), at the end with "calibrate".

    Raises:
        ArgumentError: invalid options, no BatchNorm to set, no images, or a memory budget below one batch.
        CalibrationError: statistics of a site are not finite.

    >>> from normswap.demo import FOLDER, MODEL
    >>> model = normswap.load_model(MODEL)
    >>> swapped = normswap.swap_norms(model)
    >>> images = normswap.load_images(model, FOLDER, "train").draw(40, seed=0)
    >>> found = calibrate(swapped, images, model, CalibrationOptions(method="channel"))
    >>> found.sites[0].site, found.sites[0].r2 > 0.8
    ('blocks.0.norm1', True)
    """
    options = options or CalibrationOptions()
    options.check()
    check_state(original)
    check_weights(original, swapped)
    thaw(swapped)
    original = thawed(original)
    norms = batch_norms(swapped)
    sites = [path for path in norms if isinstance(find_module(original, path), nn.LayerNorm)]
    if not sites:
        raise ArgumentError(f"{type(swapped).__name__} has no BatchNorm where the original has a LayerNorm: swap first")
    observers = {path: _MapObserver(path, norm) for path, norm in norms.items() if path not in sites}
    batches = ImageBatches.of(images, next(original.parameters()))
    if batches is not images:  # who passes finished batches has seen to that
        batches, _ = with_views(batches, images, original, options)
    budget = options.memory_budget or default_budget()
    with (
        eval_mode(original, swapped),
        Lockstep(original, swapped, sites, batches, dict(observers), budget) as lockstep,
    ):
        work = _Work(lockstep, options, original, norms, sites, observers)
        work.run(progress)
    return work.reconstruction.result


class _Work:
    """Everything to set, in the order in which the converted model runs it."""

    def __init__(
        self,
        lockstep: Lockstep,
        options: CalibrationOptions,
        original: nn.Module,
        norms: dict[str, TokenBatchNorm],
        sites: list[str],
        observers: dict[str, _MapObserver],
    ) -> None:
        self.lockstep, self.norms, self.observers = lockstep, norms, observers
        reconstructs = options.method == "reconstruct"
        self.batches_seen = lockstep.count if reconstructs else None
        for observer in observers.values():
            observer.batches = self.batches_seen
        # What is refined is seen where the branch's writer ends.
        steps = options.refine_steps if options.solves_writers else 0
        self.reconstruction = Reconstruction(lockstep, options.method, original, norms, steps)
        self.bounds = Bounds(lockstep, original, norms, options.effective_bound)
        lane = lockstep.converted
        readers = find_readers(lane, sites) if reconstructs else []
        writers = find_writers(lane, sites) if options.solves_writers else []
        stops = [lane.at(Stop(path)) for path in sites] + [lane.at(stop) for group in readers for stop in group.stops]
        self.writers = [writer for writer in writers if not _crossed(lane, writer, stops)]
        self.agenda = [item for _, item in _agenda(lane, sites, readers, self.writers)]

    def run(self, progress: Progress) -> None:
        """Do all of it."""
        for i, item in enumerate(self.agenda):
            progress(f"calibrate: {_where(item)}", i, len(self.agenda))
            self._set(item)
        self.lockstep.finish()
        for observer in self.observers.values():
            observer.solve()
        progress("calibrate", len(self.agenda), len(self.agenda))

    def _set(self, item: Any) -> None:
        if isinstance(item, Readers):
            self.reconstruction.solve_readers(item, self.writers)
        elif isinstance(item, Writer):
            for path in item.sites:  # its statistics change with the writer, its map does not
                observer = _MapObserver(path, self.norms[path], self.batches_seen)
                self.lockstep.observers[path] = self.observers[path] = observer
            self.reconstruction.solve_writer(item)
            for path in item.sites:  # the writer is solved as a linear layer, so what bounds it comes after
                self.reconstruction.note_bound(path, self.bounds.set(path, item))
        else:
            behind = next((writer for writer in self.writers if item in writer.sites), None)
            bound = NONE if behind is not None else self.bounds.set(item)
            self.reconstruction.set_norm(item, behind, bound)


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
