"""Win back what calibration left: distil the original into the swapped model, with the BatchNorms still in.

The teacher is the original. The loss is KL of the answers plus the relative error of the residual stream in front of
every norm (Romero et al. 2015, "FitNets", section 2.2: hints at inner layers); labels are used only if asked for.
A converted model is a sharp starting point, so the learning rate warms up, gradients are clipped, a step whose loss
or gradient is not finite is dropped, and images held out decide at the end whether the result is taken at all.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ambient import known_context, thaw, thawed
from ..calibration.activation_store import default_budget
from ..errors import ArgumentError
from ..inputs.batches import checked, gather
from ..inputs.dataset import ImageSet
from ..inputs.normalisation import Normalisation
from ..model_utils import eval_mode
from ..module_state import check_state, check_weights
from ..progress import Progress, no_progress
from ..records.report import Finetuning
from .augment import Corrupted
from .holdout import held_out_of
from .options import FinetuneOptions, Resume, goes_on
from .run_state import TrainingState
from .trainer import Run, steps_per_epoch


@known_context()
def finetune(
    swapped: nn.Module,
    images: Iterable[Any],
    original: nn.Module,
    options: FinetuneOptions | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    state: str | Path | TrainingState | None = None,
    resume: Resume = False,
    save_every: float = 300.0,
    normalisation: Normalisation | None = None,
    progress: Progress = no_progress,
) -> Finetuning:
    """Train ``swapped``, in place, to answer as ``original`` does, which stays as it is.

    Dropout and drop path are off. Unless the model is closer to the original than before on images that were held
    out, by two standard errors, it gets its old weights back, so chance makes no model worse. Under torchrun or
    accelerate every process passes the same images and trains on its share of them.

    Args:
        swapped: a calibrated model with BatchNorm in; or a copy of ``original``, to see what training alone does.
        images: batches `[B, C, H, W]`, or pairs of them and labels `[B]`; held in memory.
        original: the teacher.
        options: see `FinetuneOptions`.
        held_out: images to measure on, in the form of ``images``. Give some that calibration has not seen either: on
            its own images a calibrated model is better than it is. Default: one in ten of ``images``.
        state: file that keeps the state of the run, written atomically, from the start on; it is deleted at the end.
        resume: go on from ``state``; on a CPU to the same bits as an undisturbed run. "auto" does so if the file is
            there, and begins if it is not.
        save_every: seconds between two writings.
        normalisation: of the images; default: what an `ImageSet` or timm's config of the original says.
        progress: called with ("finetune: loss ..., agreement ...", steps done, steps in all).

    Raises:
        ArgumentError: invalid options or images, labels out of range, models of different heads.
        CheckpointError: ``state`` is not there, truncated, or of another run.
        OutputError: ``state`` cannot be written; what was there still is.
        CalibrationError: too many steps in a row without finite numbers.
        MissingExtraError: accelerate is not installed.

    >>> model = timm.create_model("test_vit").eval()
    >>> swapped = normswap.swap_norms(model)
    >>> images = [torch.randn(20, 3, 160, 160)]
    >>> found = finetune(swapped, images, model, FinetuneOptions(batch_size=6))
    >>> found.images, found.held_out, found.steps
    (18, 2, 3)
    """
    options = options or FinetuneOptions()
    options.check()
    kept = state if state is None or isinstance(state, TrainingState) else TrainingState(Path(state))
    resumed = goes_on(None if kept is None else kept.path, resume)
    check_state(swapped)
    check_weights(original, swapped)
    thaw(swapped)
    original = thawed(original)
    weight = next(swapped.parameters())
    check_images(images, weight, options, held_out is not None)
    pixels, labels = gather(images, weight)
    if len(pixels) < 2 and held_out is None:
        raise ArgumentError(f"fine-tuning needs at least two images, there are {len(pixels)}")
    held = None if held_out is None else gather(held_out, weight)[0]
    if held is not None and held.shape[1:] != pixels.shape[1:]:
        raise ArgumentError(f"images of {list(pixels.shape[1:])}, but held out are some of {list(held.shape[1:])}")
    corrupted = Corrupted.of(options.views, images, pixels, original, normalisation)
    run = Run(swapped, original, options, pixels, labels, held, corrupted)
    if kept is not None:
        kept.fingerprint = run.fingerprint()
        before = kept.load() if resumed else None
        if before is not None:
            run.load(before)
    with eval_mode(original, swapped), torch.enable_grad():
        return run.go(kept, save_every, progress)


def check_images(images: Iterable[Any], like: torch.Tensor, options: FinetuneOptions, held_out: bool) -> None:
    """Refuse early what `finetune` would refuse late, where the images tell how many they are before they are read.

    Args:
        images: in the form that `finetune` takes.
        like: a parameter of the model, whose dtype and device the images will have.
        options: what they are for.
        held_out: whether there are others that decide.

    Raises:
        ArgumentError: too few for one step, or more than the memory that is free can hold.
    """
    if isinstance(images, ImageSet):
        count = len(images)
        # As batches and, for a moment, as the one tensor they become.
        need = 2 * count * math.prod(images.input_size) * like.element_size()
        free = 2 * default_budget()
        if like.device.type == "cpu" and need > free:
            gib = f"{need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
            what = f"{count} images of {list(images.input_size)} need {gib}"
            raise ArgumentError(f"{what}: fine-tune on fewer")
    elif isinstance(images, list):
        count = sum(len(batch) for batch, _ in checked(images))
    else:
        return
    if count > 1:  # that one is not enough is said where they are read
        steps_per_epoch(count, 0 if held_out else held_out_of(count), options)
