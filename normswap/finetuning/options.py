"""How to fine-tune: every choice in one place, with the reasons for the defaults in docs/finetuning.md.

Imports no torch, so that the command line can read it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    import torch

BN_MODES = ("frozen", "train")
FADE_ORDERS = ("all", "blockwise", "mlp-first")
Resume = bool | Literal["auto"]


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune.

    Attributes:
        epochs: passes over the images.
        lr: peak learning rate.
        opt: name of a timm optimiser.
        weight_decay: as the optimiser takes it.
        warmup: share of the steps over which the learning rate rises; it then falls as a cosine to zero.
        batch_size: images of one step on one process.
        accumulate: batches whose gradients add up to one step.
        clip_grad: largest norm of the gradient.
        kl, features, labels: weights of the three losses; ``labels`` above 0 needs labelled images.
        bn_mode: "frozen" trains through BatchNorm's fixed map, its statistics as calibration set them; "train" uses
            the statistics of each batch, and afterwards estimates them again on the images with their views.
        momentum: of the running statistics in "train".
        stem: also train the first layer, the one that reads pixels. Neighbouring pixels are alike, so steps of one size
            for every weight, as Adam makes them, add up there: it is the sharpest place of the model.
        hflip: how likely a training image is mirrored, for teacher and student alike.
        scale: least share of a training image's area that a random crop keeps; 1 for no crops.
        views: share of the training images that carry one random corruption in a step (noise, blur, contrast and so
            on), another one in every epoch, 0 to 1. They keep what the views of the calibration gave, see
            docs/robustness.md. Default: half of them, if they are pixels in 0..1 once their normalisation is undone.
        fade: share of the run over which each LayerNorm is blended into its BatchNorm; 0 for none, see `normswap.fade`.
        fade_order: "all", "blockwise" or "mlp-first".
        ema: decay of an exponential moving average of the weights, which is then the result; None for none.
        amp_dtype: autocast to it; None for float32.
        bad_steps: so many dropped steps in a row end the run.
        seed: draws the order of the images.
    """

    epochs: int = 1
    lr: float = 1e-5
    opt: str = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.1
    batch_size: int = 32
    accumulate: int = 1
    clip_grad: float = 1.0
    kl: float = 1.0
    features: float = 1.0
    labels: float = 0.0
    bn_mode: str = "frozen"
    momentum: float = 0.01
    stem: bool = False
    hflip: float = 0.0
    scale: float = 1.0
    views: float | None = None
    fade: float = 0.0
    fade_order: str = "all"
    ema: float | None = None
    amp_dtype: "torch.dtype | None" = None
    bad_steps: int = 5
    seed: int = 42

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ArgumentError: a number out of its range, an unknown mode or optimiser.
        """
        if self.bn_mode not in BN_MODES:
            raise ArgumentError(f"`bn_mode` must be one of {', '.join(BN_MODES)}, not {self.bn_mode!r}")
        if self.fade_order not in FADE_ORDERS:
            raise ArgumentError(f"`fade_order` must be one of {', '.join(FADE_ORDERS)}, not {self.fade_order!r}")
        if not 0 <= self.fade < 1:
            raise ArgumentError(f"`fade` must be a share of the run from 0 to below 1, not {self.fade}")
        positive = ("epochs", "lr", "batch_size", "accumulate", "clip_grad", "bad_steps")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ArgumentError(f"`{name}` must be above 0, not {getattr(self, name)}")
        if not all(getattr(self, name) >= 0 for name in ("kl", "features", "labels", "weight_decay")):
            raise ArgumentError("`kl`, `features`, `labels` and `weight_decay` must be 0 or more")
        if not self.kl + self.features + self.labels > 0:
            raise ArgumentError("`kl`, `features` and `labels` are all 0: there is nothing to train for")
        if not 0 <= self.hflip <= 1 or not 0 < self.scale <= 1:
            raise ArgumentError("`hflip` must be a probability, `scale` a share of an image's area from above 0 to 1")
        if self.views is not None and not 0 <= self.views <= 1:
            raise ArgumentError(f"`views` must be a share of the images from 0 to 1, not {self.views}")
        if not 0 <= self.warmup < 1 or not 0 < self.momentum <= 1 or not (self.ema is None or 0 < self.ema < 1):
            raise ArgumentError("`warmup` must be from 0 to below 1, `momentum` above 0 to 1, `ema` between 0 and 1")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        import torch
        from timm.optim import create_optimizer_v2

        try:
            create_optimizer_v2([torch.nn.Parameter(torch.zeros(2, 2))], opt=self.opt, lr=self.lr)
        except (ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
            raise ArgumentError(f"timm cannot make the optimiser {self.opt!r} here: {error}") from error


def goes_on(state: str | Path | None, resume: Resume) -> bool:
    """Return whether a run goes on from its file, before any work.

    Args:
        state: the file; None if none is kept.
        resume: True to go on, False to begin, "auto" to go on if the file is there and to begin if it is not.

    Raises:
        ArgumentError: an unknown value, or no file to go on from.
        CheckpointError: the file is not there.

    >>> goes_on("not-there.state", "auto")
    False
    """
    if resume not in (False, True, "auto"):
        raise ArgumentError(f"`resume` must be True, False or 'auto', not {resume!r}")
    if not resume:
        return False
    if state is None:
        raise ArgumentError("`resume` needs `state`, the file that holds the state of the run")
    there = Path(state).is_file()
    if not there and resume != "auto":
        raise CheckpointError(f"{state}: no such file, so there is no run to resume")
    return there


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine (Loshchilov & Hutter 2017)."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
