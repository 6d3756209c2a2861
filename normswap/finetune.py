"""Win back what calibration left: distil the original into the swapped model, with the BatchNorms still in.

The teacher is the original. The loss is KL of the answers plus the relative error of the residual stream in front of
every norm (Romero et al. 2015, "FitNets", section 2.2: hints at inner layers); labels are used only if asked for.
A converted model is a sharp starting point, so the learning rate warms up, gradients are clipped, a step whose loss
or gradient is not finite is dropped, and images held out decide at the end whether the result is taken at all.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibrate import Progress, no_progress
from .errors import ArgumentError
from .graph import eval_mode
from .recipe import FinetuneOptions
from .report import Finetuning
from .state import TrainingState
from .training import Run


def finetune(
    swapped: nn.Module,
    images: Iterable[Any],
    original: nn.Module,
    options: FinetuneOptions | None = None,
    *,
    state: str | Path | None = None,
    resume: bool = False,
    save_every: float = 300.0,
    progress: Progress = no_progress,
) -> Finetuning:
    """Train ``swapped``, in place, to answer as ``original`` does, which stays as it is.

    Dropout and drop path are off. One image in ten is held out; if the model is not closer to the original on those
    than before, it gets its old weights back, so it is never worse for it. Under torchrun or accelerate every process
    passes the same images and trains on its share of them.

    Args:
        swapped: a calibrated model with BatchNorm in; or a copy of ``original``, to see what training alone does.
        images: batches `[B, C, H, W]`, or pairs of them and labels `[B]`; held in memory.
        original: the teacher.
        options: see `FinetuneOptions`.
        state: file that keeps the state of the run, written atomically.
        resume: go on from ``state``; on a CPU to the same bits as an undisturbed run.
        save_every: seconds between two writings.
        progress: called with ("finetune: loss ..., agreement ...", steps done, steps in all).

    Raises:
        ArgumentError: options or images that cannot be meant, labels out of range, models of different heads.
        CheckpointError: ``state`` is truncated, or of another run.
        OutputError: ``state`` cannot be written; what was there still is.
        CalibrationError: too many steps in a row without finite numbers.
        MissingExtraError: accelerate is not installed.
    """
    options = options or FinetuneOptions()
    options.check()
    if resume and state is None:
        raise ArgumentError("resume needs the file with the state of the run")
    pixels, labels = _gather(images, next(swapped.parameters()))
    run = Run(swapped, original, options, pixels, labels)
    kept = TrainingState(Path(state), run.fingerprint()) if state is not None else None
    if kept is not None and resume:
        run.load(kept.load())
    with eval_mode(original, swapped), torch.enable_grad():
        return run.go(kept, save_every, progress)


def _gather(images: Iterable[Any], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return all images `[M, C, H, W]` and, if every batch has some, their labels `[M]`."""
    pixels: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for item in images:
        batch, *rest = item if isinstance(item, tuple | list) else (item,)
        if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
            raise ArgumentError("images must be batches [B, C, H, W], or tuples that start with one")
        if pixels and batch.shape[1:] != pixels[0].shape[1:]:
            raise ArgumentError(
                f"images must all have one size; there are {list(pixels[0].shape[1:])} and {list(batch.shape[1:])}"
            )
        pixels.append(batch.to(like))
        if rest and isinstance(rest[0], torch.Tensor):
            labels.append(rest[0].to(like.device))
    if sum(map(len, pixels)) < 2:
        raise ArgumentError(f"fine-tuning wants at least two images, there are {sum(map(len, pixels))}")
    return torch.cat(pixels), torch.cat(labels) if len(labels) == len(pixels) else None
