"""The whole road in one call: plan, swap, calibrate, fold, verify, compare. Command line and API both end here."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import check_method
from ..errors import ArgumentError
from ..evaluation.evaluate import evaluate_models
from ..evaluation.worst_images import DEFAULT_COUNT, WorstImages
from ..finetuning.finetune import check_images, finetune
from ..finetuning.holdout import hold_out
from ..finetuning.options import FinetuneOptions
from ..inputs.batches import BATCH_SIZE, rebatched
from ..inputs.dataset import ImageSet
from ..model_utils import eval_mode, has_classes, meta_copy
from ..outputs.save import describe_edits
from ..planning.options import FfnBn
from ..planning.plan import Plan, make_plan
from ..progress import Progress, no_progress
from ..records.report import ConversionReport
from ..search.budget import MAX_EVALUATIONS, NO_HEAD, Budget
from ..search.trials import Attempt, Trials
from ..surgery.fold import created_biases, fold_norms, max_difference
from .checks import DEFAULT_ATOL, describe_images, failed_check, fold_problem, pictured
from .conversion import Conversion

DEFAULT_METHOD = "reconstruct"


def convert(
    model: nn.Module,
    images: Iterable[Any],
    method: str = DEFAULT_METHOD,
    ffn_bn: FfnBn = "pre-act",
    *,
    eval_images: Iterable[Any] | None = None,
    keep: Iterable[str] = (),
    plan: Plan | None = None,
    reconstruct: str = "all",
    memory_budget: int | None = None,
    refine_steps: int | None = None,
    atol: float = DEFAULT_ATOL,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_keep: int | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
    amp_dtype: torch.dtype | None = None,
    finetune_options: FinetuneOptions | None = None,
    finetune_images: Iterable[Any] | None = None,
    finetune_held_out: Iterable[Any] | None = None,
    finetune_state: str | Path | None = None,
    resume: bool = False,
    control: bool = False,
    worst_images: int = DEFAULT_COUNT,
    name: str | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Take LayerNorm out of a pretrained model and measure what that cost. ``model`` stays as it is.

    Args:
        model: a timm vision transformer with its weights.
        images: calibration images, no labels needed: any iterable of batches `[B, C, H, W]`, normalised as the
            model wants them, or of pairs of images and labels `[B]`. All are held in memory.
        method: "reconstruct", "channel" or "moments", see `normswap.calibrate`.
        ffn_bn: where BatchNorm goes between the FFN's linear layers: "pre-act", "post-act" or "none".
        eval_images: what accuracy and agreement are measured on, in the same form; default: ``images``.
        keep: shell patterns of module paths whose LayerNorm stays; not together with ``plan``.
        plan: from `make_plan`, if you have one.
        reconstruct: which layers "reconstruct" re-solves, "all" or "readers".
        memory_budget: bytes that calibration's activations may take in memory; the rest goes to disk.
        refine_steps: gradient steps of "reconstruct" for what attention reads, see `normswap.calibrate`.
        atol: largest absolute difference of an output that the fold may cause.
        max_drop: largest tolerated loss of top-1, in points. If the conversion loses more, the LayerNorms that cost
            most stay, as few as are found to do, see `normswap.budget`. Fine-tuning comes after that.
        min_agreement: least percent of images with the original's answer, in the same way.
        max_keep: how many LayerNorms may stay for it, beside those of ``keep``; 0 only checks; default: all but one.
        max_evaluations: how many conversions may be tried for it.
        amp_dtype: autocast to it in the evaluation; calibration and fold never use it.
        finetune_options: fine-tune after calibration, see `normswap.finetune`; default: do not.
        finetune_images: what to fine-tune on, in the form of ``images``; default: ``images``, one in ten of which
            is then held out of calibration and training and decides whether training was a gain.
        finetune_held_out: images that decide instead, see `normswap.finetune`.
        finetune_state, resume: the file that keeps the state of the fine-tuning, and whether to go on from it.
        control: also fine-tune a copy of the unconverted model alike, as stage "control": what training alone gains.
        worst_images: how many of the evaluation images that changed most go into the report, as small pictures.
        name: what to call the model in the report.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: an argument that cannot be meant, or no images.
        ModelRefusedError, NoLayerNormError: see `make_plan`.
        CalibrationError, FoldError: statistics, training or folded weights that are not finite.
        CheckpointError, OutputError, MissingExtraError: from `normswap.finetune`.
        CheckFailedError: fused and unfused differ by more than ``atol``, or the accuracy budget is not met; its
            ``report`` holds what was measured, and its ``conversion`` what misses nothing but the budget.
    """
    check_method(method, reconstruct, refine_steps)
    budget = Budget(max_drop, min_agreement, max_keep, max_evaluations)
    budget.check()
    if control and (finetune_options is None or finetune_options.labels == 0):
        raise ArgumentError("a control wants fine-tuning on labels; without them the original is its own teacher")
    if min_agreement is not None and not has_classes(model):
        raise ArgumentError(NO_HEAD)
    if math.isnan(atol):
        raise ArgumentError("--atol is a number; nan would never fail")
    weight = next(model.parameters())
    items = list(images)
    held_out, parted = None if finetune_held_out is None else list(finetune_held_out), False
    if finetune_options is not None and finetune_images is None and held_out is None:
        items, held_out = hold_out(items, finetune_options.seed)
        parted = True
    batches = [batch.to(weight) for batch in rebatched(items, BATCH_SIZE)]
    if not batches:
        raise ArgumentError("no images to calibrate on")
    if finetune_options is not None:
        finetune_options.check()
        lessons = items if finetune_images is None else finetune_images
        check_images(lessons, weight, finetune_options, held_out is not None)
    channels, height, width = batches[0].shape[1:]
    size = (channels, height, width)
    plan = plan or make_plan(model, keep, input_size=size)
    if tuple(plan.input_size) != size:  # padding, and with it a fold, may depend on the size
        raise ArgumentError(f"the plan is for images of {list(plan.input_size)}, these are {list(size)}")
    clock = _Clock(plan=round(plan.seconds, 3), finetune=0.0)
    if not plan.swapped_sites:
        raise ArgumentError(f"all {len(plan.sites)} LayerNorms are kept: nothing to convert")
    count = sum(len(batch) for batch in batches)

    with eval_mode(model), torch.no_grad(), clock("forward_pass"):
        for i, batch in enumerate(batches):
            progress("forward pass", i + 1, len(batches))
            model(batch)
    # A single module left in training mode, as a BatchNorm of the model's own, would change while it is measured.
    original = copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model
    source = items if eval_images is None else eval_images
    total = len(eval_images) if isinstance(eval_images, ImageSet) else count

    choices = (method, ffn_bn, reconstruct, memory_budget, refine_steps)
    trade, answers = None, dict[int, torch.Tensor]()
    if budget.limit(len(plan.swapped_sites)):
        if isinstance(source, Iterator):  # it is gone through more than once
            source = list(source)
        with clock("search"):
            trials = Trials(budget, original, plan, batches, choices, source, amp_dtype, answers, progress, total)
            trade, chosen = trials.search()
    else:
        chosen = Attempt.make(original, plan, batches, *choices, progress)
    plan, swapped, calibrated, fitted = chosen.plan, chosen.swapped, chosen.calibrated, chosen.fitted
    clock.seconds["calibrate"] = chosen.seconds
    trained, finetuning, controls = calibrated, None, {}
    if finetune_options is not None:
        trained = copy.deepcopy(calibrated)
        lessons = list(lessons) if control else lessons
        if control:
            controls = {"control": copy.deepcopy(original)}
            with clock("control"):
                finetune(controls["control"], lessons, original, finetune_options, held_out=held_out, progress=progress)
        with clock("finetune"):
            finetuning = finetune(
                trained,
                lessons,
                original,
                finetune_options,
                held_out=held_out,
                state=finetune_state,
                resume=resume,
                progress=progress,
            )
    with clock("fold"):
        fused = fold_norms(trained, input_size=plan.input_size)
        difference = max_difference(trained, fused, batches)

    report = ConversionReport(
        model=name or plan.model,
        architecture=plan.model,
        method=method,
        ffn_bn=ffn_bn,
        calib_samples=count,
        sites=plan.counts(ffn_bn),
        plan=plan.to_json(ffn_bn)["sites"],
        ffns=plan.to_json(ffn_bn)["ffns"],
        calibration_data=describe_images(items if parted else images, count),
        evaluation_data=describe_images(images if eval_images is None else eval_images, count),
        fits=fitted.sites,
        layers=fitted.layers,
        stream=fitted.stream,
        reconstruct=reconstruct if method == "reconstruct" else None,
        refine_steps=fitted.refine_steps,
        finetuning=finetuning,
        budget=trade,
        fold_max_abs_err=difference,
        created_biases=created_biases(original, fused),
        seconds=clock.seconds,
    )
    stages = {"original": original, **controls, "swapped": swapped, "calibrated": calibrated}
    stages |= ({"finetuned": trained} if finetuning is not None else {}) | {"fused": fused}
    with clock("evaluate"):
        worst = WorstImages(worst_images)
        known = answers if trade else None
        report.stages = evaluate_models(stages, source, amp_dtype, progress, total, worst, known)
    measured_on = eval_images if eval_images is not None else items if parted else images
    report.worst, thumbnails = pictured(worst, measured_on, model)
    report.skipped_images = sorted({n for s in (images, eval_images) if isinstance(s, ImageSet) for n in s.skipped})
    if eval_images is not None and not isinstance(eval_images, ImageSet):
        report.evaluation_data = describe_images(eval_images, report.stages[0].n)
    if not difference <= atol:
        raise failed_check(report, f"{fold_problem(trained, batches, plan, difference, atol)}: not saved")
    fused.train(model.training)
    edits = describe_edits(original, fused)
    conversion = Conversion(fused, report, plan, edits, batches[0], trained, meta_copy(original), thumbnails)
    first, last = report.stages[0], report.stages[-1]
    missing = budget.missing(last)
    if missing is not None:
        raise failed_check(report, f"{missing}: not saved")
    problem = budget.problem(first, last)
    if trade is not None:
        trade.met = problem is None
    if problem is not None:
        tried = f", the best of {len(trade.trials)} tries with at most {trade.max_keep} put back" if trade else ""
        raise failed_check(report, f"{problem}{tried}", conversion)
    return conversion


class _Clock:
    """Wall-clock seconds per named step."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)
