"""What `convert` and `fuse` are told beyond model and images. Imports no torch: the command line reads it too."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..finetuning.options import FinetuneOptions, Resume, goes_on

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EvaluationOptions:
    """How a result is measured, checked and described.

    Attributes:
        atol: largest absolute difference of an output that the fold may cause; more is a `CheckFailedError`. Default:
            the fold is proven in float64, and rounding that moves outputs by more than usual is warned about only.
        amp_dtype: autocast to it in the evaluation; calibration and fold never use it.
        worst_images: how many of the evaluation images that changed most go into the report, as small pictures.
        name: what to call the model in the report; default: timm's name of the architecture.
        stress: how many evaluation images the short check on corrupted images draws, see `normswap.stress_models`; 0
            leaves it out.
        max_stress_drop: points of top-1 (of agreement without labels) that may be lost on the mean over the rows of
            that check; more is a `CheckFailedError`.
    """

    atol: float | None = None
    amp_dtype: "torch.dtype | None" = None
    worst_images: int = 8
    name: str | None = None
    stress: int = 200
    max_stress_drop: float | None = None

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ArgumentError: a number out of its range.
        """
        if self.atol is not None and not self.atol >= 0:
            raise ArgumentError(f"`atol` must be 0 or more, not {self.atol}")
        if self.worst_images < 0:
            raise ArgumentError(f"`worst_images` must be 0 or more, not {self.worst_images}")
        if self.stress < 0:
            raise ArgumentError(f"`stress` must be 0 or more images, not {self.stress}")
        if self.max_stress_drop is not None and (math.isnan(self.max_stress_drop) or not self.stress):
            raise ArgumentError(f"`max_stress_drop` {self.max_stress_drop:g} needs a number of points, and `stress`")


@dataclass(frozen=True)
class FinetuneStage:
    """Fine-tuning as a stage of `convert`: how, on what, and where its state is kept.

    Attributes:
        options: how to train.
        images: what to train on, in the form of the calibration images; default: these themselves, one in ten of
            which is then held out of calibration and training and decides whether training was a gain.
        held_out: images that decide instead, see `normswap.finetune`.
        state: file that keeps the state of the run from the end of calibration on; it is deleted when the result is
            saved.
        resume: continue from ``state``, without calibrating again; "auto" does so if the file is there, and begins if
            it is not.
        control: also fine-tune a copy of the unconverted model alike, as stage "control": what training alone gains.
    """

    options: FinetuneOptions = field(default_factory=FinetuneOptions)
    images: Iterable[Any] | None = None
    held_out: Iterable[Any] | None = None
    state: str | Path | None = None
    resume: Resume = False
    control: bool = False

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ArgumentError: see `FinetuneOptions.check`; also a run to resume without naming its state, or a control
                without labels.
            CheckpointError: a run to resume whose state is not there.
        """
        self.options.check()
        goes_on(self.state, self.resume)
        if self.control and self.options.labels == 0:
            raise ArgumentError(
                "`control` needs fine-tuning on labels; without them the original would be its own teacher"
            )
