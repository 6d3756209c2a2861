"""Continue from a swapped checkpoint: fine-tune it, or fold it into a finished model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ambient import known_context
from ..errors import CheckFailedError
from ..evaluation.evaluate import evaluate_models
from ..evaluation.worst_images import WorstImages
from ..finetuning.finetune import finetune
from ..finetuning.options import FinetuneOptions, Resume, goes_on
from ..inputs.batches import BATCH_SIZE, checked, rebatched
from ..inputs.dataset import ImageSet, describe
from ..inputs.normalisation import Normalisation
from ..inputs.overlap import note_overlap
from ..outputs.rebuild import describe_edits, rebuilt
from ..outputs.swapped_checkpoint import Swapped
from ..progress import Progress, no_progress
from ..records.provenance import versions
from ..records.report import ConversionReport, StageMetrics
from ..search.budget import AccuracyBudget
from ..surgery.fold import created_biases, fold_norms, judge_fold
from .checks import FOLD_IMAGES, FoldCheck, pictured
from .conversion import Conversion
from .options import EvaluationOptions
from .stress_check import shuffled, stress_check

# Random images that show whether a fold is exact where none are given; it is a matter of arithmetic, not of content.
_RANDOM_IMAGES = 8


@known_context()
def finetune_swapped(
    swapped: Swapped,
    original: nn.Module,
    images: Iterable[Any],
    options: FinetuneOptions | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    eval_images: Iterable[Any] | None = None,
    state: str | Path | None = None,
    resume: Resume = False,
    amp_dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> None:
    """Fine-tune a swapped checkpoint, in place, and bring its report up to date.

    Args:
        swapped: from `normswap.load_swapped`.
        original: the model it came from, with weights: the teacher.
        images: what to train on, see `normswap.finetune`.
        options, held_out, state, resume: see `normswap.finetune`.
        eval_images: what original, start and result are compared on; default: ``images``.
        amp_dtype: autocast to it in the evaluation.
        progress: called with (what, done, total).

    Raises:
        ArgumentError, CheckpointError, OutputError, CalibrationError, MissingExtraError: see `normswap.finetune`.

    >>> model, images = timm.create_model("test_vit").eval(), [torch.randn(20, 3, 160, 160)]
    >>> options = normswap.CalibrationOptions(method="channel", bound="tight")
    >>> result = normswap.convert(model, images, calibration=options)
    >>> swapped = Swapped(result.swapped, model, result.plan, result.report)
    >>> finetune_swapped(swapped, model, images, FinetuneOptions(batch_size=6))
    >>> swapped.report.finetuning.steps
    3
    >>> type(fuse(swapped).model.norm).__name__
    'TokenBound'
    """
    resumed = goes_on(state, resume)
    items = images if eval_images is not None else list(checked(images))
    evaluation = items if eval_images is None else _held(eval_images)
    start = "finetuned before" if swapped.report.finetuning is not None else "calibrated"
    answers: dict[int, torch.Tensor] = {}  # of the original, which need not run twice
    first = _evaluate({"original": original, start: swapped.model}, evaluation, amp_dtype, progress, answers=answers)
    found = finetune(
        swapped.model,
        items,
        original,
        options,
        held_out=held_out,
        state=state,
        resume=resumed,
        normalisation=Normalisation.of(images, original) if isinstance(images, ImageSet) else None,
        progress=progress,
    )
    models = {"original": original, "finetuned": swapped.model}
    last = _evaluate(models, evaluation, amp_dtype, progress, answers=answers)
    _judge(swapped.report, last)
    report = swapped.report
    report.worst, report.stress = [], None  # of the model before
    report.finetuning, report.stages, report.versions = found, [*first, last[-1]], versions()
    report.seconds["finetune"] = round(report.seconds.get("finetune", 0.0) + found.seconds, 3)
    report.evaluation_data = describe(evaluation, last[-1].n)
    note_overlap(report, evaluation, [items])


@known_context()
def fuse(
    swapped: Swapped,
    images: Iterable[Any] | None = None,
    *,
    original: nn.Module | None = None,
    evaluation: EvaluationOptions | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Fold a swapped checkpoint; what comes back saves itself as `normswap.convert`'s result does.

    Args:
        swapped: from `normswap.load_swapped`; its model stays as it is.
        images: what the models are compared on; without any, fused and unfused are compared on random images, and the
            accuracies in the report stay those of the swapped checkpoint.
        original: the model it came from, with weights, to measure the fused one against.
        evaluation: how the result is measured and checked.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: invalid options, or no images.
        FoldError: folded weights are not finite.
        CheckFailedError: the fold is not exact, or fused and unfused differ by more than ``evaluation.atol``.
    """
    evaluation = evaluation or EvaluationOptions()
    evaluation.check()
    model, report, size = swapped.model, swapped.report, swapped.plan.input_size
    images = None if images is None else _held(images)
    batches = _fold_images(images, size, next(model.parameters()))
    verdicts = judge_fold(model, size)
    fused = fold_norms(model, verdicts=verdicts)
    thumbnails: list[str] = []
    fold = FoldCheck.of(model, fused, batches, verdicts)
    for name, value in fold.record.items():
        setattr(report, name, value)
    report.created_biases, report.versions = created_biases(swapped.original, fused), versions()
    if images is not None:
        before = {} if original is None else {"original": original}
        worst = WorstImages(0 if original is None else evaluation.worst_images)
        models = {**before, "swapped": model, "fused": fused}
        report.stages = _evaluate(models, images, evaluation.amp_dtype, progress, worst)
        if original is not None:
            _judge(report, report.stages)
        report.worst, thumbnails = pictured(worst, images, fused)
        report.stress = None
        if original is not None and evaluation.stress:
            some = shuffled(images, images, report.stages[-1].n, evaluation.stress, batches[0])
            report.stress = stress_check(original, fused, some, evaluation, progress)
        report.evaluation_data, report.overlap = describe(images, report.stages[-1].n), None
    problem = fold.problem(evaluation.atol)
    if problem is not None:
        raise CheckFailedError(f"{problem}: not saved", report)
    base = rebuilt(swapped.original, swapped.original)
    edits = describe_edits(base.base, fused)
    return Conversion(fused, report, swapped.plan, model, edits, batches[0], swapped.original, base, thumbnails)


def _held(images: Iterable[Any]) -> Iterable[Any]:
    """Return images that can be gone through more than once; those of an `ImageSet` are read again each time."""
    return images if isinstance(images, ImageSet) else list(checked(images))


def _fold_images(images: Iterable[Any] | None, size: tuple[int, int, int], like: torch.Tensor) -> list[torch.Tensor]:
    """Return the batches `[B, C, H, W]` on which fused and unfused are compared; random ones without images."""
    if images is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(_RANDOM_IMAGES, *size, generator=generator).to(like)]
    some = images.draw(FOLD_IMAGES, 0) if isinstance(images, ImageSet) else images
    return [batch.to(like) for batch in rebatched(some, BATCH_SIZE)]


def _judge(report: ConversionReport, stages: list[StageMetrics]) -> None:
    """Say whether the model as it is now holds the budget that the conversion was given, if there was one."""
    record = report.budget
    if record is not None:
        budget = AccuracyBudget(record.max_drop, record.min_agreement)
        record.met = budget.missing(stages[-1]) is None and budget.problem(stages[0], stages[-1]) is None


def _evaluate(
    models: dict[str, nn.Module],
    images: Iterable[Any],
    amp_dtype: torch.dtype | None,
    progress: Progress,
    worst: WorstImages | None = None,
    answers: dict[int, torch.Tensor] | None = None,
) -> list[StageMetrics]:
    total = len(images) if isinstance(images, ImageSet) else 0
    return evaluate_models(models, images, amp_dtype, progress, total, worst, answers)
