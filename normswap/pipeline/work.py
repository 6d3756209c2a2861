"""What `convert` was asked for, and what it has made so far."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calibration.options import CalibrationOptions
from ..errors import ArgumentError
from ..finetuning.run_state import TrainingState
from ..inputs.batches import ImageBatches, held_batches
from ..inputs.dataset import ImageSet
from ..inputs.normalisation import Normalisation
from ..model_utils import has_classes
from ..outputs.rebuild import Rebuilt
from ..planning.options import FfnBn
from ..planning.plan import Plan
from ..progress import Progress
from ..records.budget import BudgetRecord
from ..records.report import ConversionReport, Finetuning
from ..search.budget import NO_HEAD, AccuracyBudget
from ..search.trials import Attempt
from .checks import FoldCheck
from .options import EvaluationOptions, FinetuneStage


@dataclass(frozen=True)
class Request:
    """What `convert` was asked for; see there."""

    model: nn.Module
    images: Iterable[Any]
    eval_images: Iterable[Any] | None
    plan: Plan | None
    ffn_bn: FfnBn
    calibration: CalibrationOptions
    budget: AccuracyBudget
    finetune: FinetuneStage | None
    evaluation: EvaluationOptions
    progress: Progress

    def check(self) -> None:
        """Refuse invalid arguments, before any image is read.

        Raises:
            ArgumentError: what is wrong with which.
        """
        self.calibration.check()
        self.budget.check()
        self.evaluation.check()
        if self.finetune is not None:
            self.finetune.check()
        if self.budget.min_agreement is not None and not has_classes(self.model):
            raise ArgumentError(NO_HEAD)


class Clock:
    """Wall-clock seconds per named step."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)


@dataclass
class Work:
    """A conversion under way.

    Attributes:
        request: what was asked for.
        original: the model in eval mode.
        plan: what becomes of each LayerNorm; the search may keep some more.
        batches: calibration images, in the dtype and on the device of the model.
        viewed, views: the same with corrupted copies of some, and how many for each image: what is calibrated on.
        calibration_data: which images these are, in words.
        source, named: what is evaluated on, and the same as the set that names its images.
        source_data: which images these are, in words; None until they are counted.
        training, held_out: images of the fine-tuning; None without.
        normalisation: of these images, where they know it themselves.
        state, resumed: the file of the training run, None where none is kept, and whether the run goes on from it.
        fingerprint: what tells this calibration from others.
        shadow, rebuilt: the original on the meta device, and what timm can rebuild of it.
        clock: seconds per step.
        outputs: of the original on the evaluation images, by number of the batch, where the search has them.
        attempt: the calibrated conversion.
        budget: the record of the search; None without one.
        trained: calibrated, and fine-tuned if that was asked for; not folded.
        finetuning: the record of the fine-tuning.
        controls: the fine-tuned copy of the unconverted model, by stage name.
        fused, fold: the folded model, and how its outputs differ from those of ``trained``.
        result: the folded model in the precision, and with the training flags, of the caller's.
        report, thumbnails: what was measured, and pictures of the images that changed most.
    """

    request: Request
    original: nn.Module
    plan: Plan
    batches: ImageBatches
    viewed: ImageBatches
    views: float
    calibration_data: str
    source: Iterable[Any]
    named: Iterable[Any]
    source_data: str | None
    training: Iterable[Any] | None
    held_out: list[Any] | None
    normalisation: Normalisation | None
    shadow: nn.Module
    rebuilt: Rebuilt
    clock: Clock
    state: TrainingState | None
    resumed: bool
    fingerprint: dict[str, Any]
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    attempt: Attempt = field(init=False)
    budget: BudgetRecord | None = None
    trained: nn.Module = field(init=False)
    finetuning: Finetuning | None = None
    controls: dict[str, nn.Module] = field(default_factory=dict)
    fused: nn.Module = field(init=False)
    fold: FoldCheck = field(init=False)
    result: nn.Module = field(init=False)
    report: ConversionReport = field(init=False)
    thumbnails: list[str] = field(init=False)

    @property
    def total(self) -> int:
        """How many evaluation images there are; 0 where only going through them would tell."""
        if isinstance(self.source, ImageSet):
            return len(self.source)
        return sum(len(batch) for batch, _ in held_batches(self.source))
