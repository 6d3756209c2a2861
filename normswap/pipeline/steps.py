"""The steps of `convert`, in their order; each takes the work at hand one step further."""

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..ambient import thawed
from ..calibration.views import with_views
from ..distributed import world
from ..errors import ArgumentError, CheckFailedError
from ..evaluation.evaluate import evaluate_models
from ..evaluation.worst_images import WorstImages
from ..finetuning.augment import Corrupted
from ..finetuning.finetune import check_images, finetune
from ..finetuning.holdout import hold_out
from ..inputs.batches import ImageBatches
from ..inputs.batches import checked as checked_batches
from ..inputs.dataset import ImageSet, describe
from ..inputs.normalisation import Normalisation
from ..inputs.overlap import note_overlap
from ..model_utils import eval_mode, meta_copy
from ..module_state import as_given, check_state, check_weights, in_float32
from ..outputs.rebuild import describe_edits, rebuilt
from ..planning.plan import Plan, make_plan
from ..progress import Progress
from ..records.report import ConversionReport
from ..search.trials import Attempt, Trials
from ..surgery.fold import created_biases, fold_norms, judge_fold
from .checks import FOLD_IMAGES, FoldCheck, pictured
from .conversion import Conversion
from .first_look import FirstLook, look_at
from .resumption import calibration_fingerprint, opened, recall, remember
from .stress_check import shuffled, stress_check
from .work import Clock, Request, Work

_TIMED = 8  # batches that tell how long a plain pass takes


def prepared(request: Request) -> Work:
    """Check the arguments, read the calibration images, plan, and time the original on a few of them."""
    request.check()
    check_state(request.model)
    check_weights(request.model)
    model = thawed(in_float32(request.model))
    request = _looked_at(request, model)
    stage = request.finetune
    weight = next(model.parameters())
    items: list[Any] = list(checked_batches(request.images))
    held_out = list(checked_batches(stage.held_out)) if stage is not None and stage.held_out is not None else None
    parted = stage is not None and stage.images is None and held_out is None
    if stage is not None and parted:
        items, held_out = hold_out(items, stage.options.seed)
    batches = ImageBatches(items, weight)
    training = normalisation = None
    if stage is not None:
        training = items if stage.images is None else stage.images
        check_images(training, weight, stage.options, held_out is not None)
        told = request.images if stage.images is None else stage.images
        normalisation = Normalisation.of(told, model) if isinstance(told, ImageSet) else None
        if stage.options.views and stage.images is None:  # refused here and not after the calibration
            Corrupted.of(stage.options.views, told, batches[0], model)
    plan = _planned(request, model, batches)
    source: Iterable[Any] = items
    named = items if parted else request.images
    if request.eval_images is not None:
        source = named = request.eval_images
    look_at(model, request.images, items, source)
    counted = request.eval_images is None or isinstance(named, ImageSet)
    # A single module left in training mode, as a BatchNorm of the model's own, would change while it is measured.
    original = copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model
    source_data = describe(named, batches.image_count) if counted else None
    fingerprint = {}
    if stage is not None and stage.state is not None:
        settings = (request.ffn_bn, request.calibration, request.budget)
        fingerprint = calibration_fingerprint(original, plan, batches, *settings, source_data)
    state, resumed = opened(stage, fingerprint)
    shadow = meta_copy(original)
    views, share = with_views(batches, request.images, model, request.calibration)
    work = Work(
        request,
        original,
        plan,
        batches,
        calibration_data=describe(items if parted else request.images, batches.image_count),
        source=source,
        named=named,
        source_data=source_data,
        training=training,
        held_out=held_out,
        normalisation=normalisation,
        shadow=shadow,
        viewed=views,
        views=share,
        rebuilt=rebuilt(original, shadow, batches[0][:2]),
        clock=Clock(plan=round(plan.seconds, 3), finetune=0.0),
        state=state,
        resumed=resumed,
        fingerprint=fingerprint,
    )
    work.clock.seconds["forward_pass"] = _forward_pass(model, batches, request.progress)
    return work


@torch.no_grad()
def _forward_pass(model: nn.Module, batches: ImageBatches, progress: Progress) -> float:
    """Return the seconds that all images would take to go through the model, from a few batches of them."""
    seconds, images = 0.0, 0
    timed = batches[:_TIMED]
    with eval_mode(model):
        model(batches[0])  # the first time takes longer
        for i, batch in enumerate(timed):
            progress("forward pass", i + 1, len(timed))
            start = time.perf_counter()
            model(batch).sum().item()  # waits for the device
            seconds, images = seconds + time.perf_counter() - start, images + len(batch)
    return round(seconds * batches.image_count / images, 3)


def _planned(request: Request, model: nn.Module, batches: ImageBatches) -> Plan:
    plan = request.plan or make_plan(model, input_size=batches.input_size)
    if tuple(plan.input_size) != batches.input_size:  # padding, and with it a fold, may depend on the size
        raise ArgumentError(f"the plan is for images of {list(plan.input_size)}, these are {list(batches.input_size)}")
    if not plan.swapped_sites:
        raise ArgumentError(f"all {len(plan.sites)} LayerNorms are kept: nothing to convert")
    return plan


def _looked_at(request: Request, model: nn.Module) -> Request:
    """Return the request after a look at the first batch of everything in it; iterators in it have lost nothing."""
    look, stage, eval_images = FirstLook(model), request.finetune, request.eval_images
    own = eval_images is None
    if eval_images is not None:
        eval_images, _ = look.at(eval_images, "`eval_images`", labels=True)
    wanted = stage is not None and stage.options.labels > 0
    trained_on = stage is not None and stage.images is None
    images, size = look.at(request.images, "`images`", own or (wanted and trained_on), wanted and trained_on)
    if stage is not None and stage.images is not None:
        training, size = look.at(stage.images, "`images` of the fine-tuning", wanted, wanted)
        stage = replace(stage, images=training)
    if stage is not None and stage.held_out is not None:
        held_out, other = look.at(stage.held_out, "`held_out`")
        if other != size:
            raise ArgumentError(f"images of {list(size)}, but held out are some of {list(other)}")
        stage = replace(stage, held_out=held_out)
    return replace(request, images=images, eval_images=eval_images, finetune=stage)


def calibrated(work: Work) -> None:
    """Swap and calibrate, where a budget is to be held as often as the search wants; or take up what a run kept."""
    kept = work.state
    if kept is not None and kept.calibration is not None:
        found = recall(kept.calibration, work.original, work.plan, work.request.ffn_bn)
        work.attempt, work.budget, seconds = found
        work.clock.seconds |= seconds
    else:
        _calibrate(work)
        if kept is not None and not work.resumed and world()[0] == 0:
            seconds = {key: value for key, value in work.clock.seconds.items() if key == "search"}
            remember(kept, work.fingerprint, work.original, work.attempt, work.budget, seconds)
    work.plan = work.attempt.plan
    work.clock.seconds["calibrate"] = work.attempt.seconds
    work.trained = work.attempt.calibrated


def _calibrate(work: Work) -> None:
    request = work.request
    if request.budget.limit(len(work.plan.swapped_sites)):
        if isinstance(work.source, Iterator):  # it is gone through more than once
            work.source = list(work.source)
        trials = Trials(
            request.budget,
            work.original,
            work.plan,
            work.viewed,
            request.ffn_bn,
            request.calibration,
            work.source,
            request.evaluation.amp_dtype,
            work.outputs,
            request.progress,
            work.total,
        )
        with work.clock("search"):
            work.budget, work.attempt = trials.search()
    else:
        work.attempt = Attempt.make(
            work.original, work.plan, work.viewed, request.ffn_bn, request.calibration, request.progress
        )


def finetuned(work: Work) -> None:
    """Fine-tune a copy of the calibrated model, and one of the original if a control was asked for."""
    stage, progress = work.request.finetune, work.request.progress
    if stage is None or work.training is None:
        return
    work.trained = copy.deepcopy(work.attempt.calibrated)
    training, held_out = work.training, work.held_out
    if stage.control:
        training = list(checked_batches(training))  # it is gone through twice
        control = copy.deepcopy(work.original)
        with work.clock("control"):
            finetune(
                control,
                training,
                work.original,
                stage.options,
                held_out=held_out,
                normalisation=work.normalisation,
                progress=progress,
            )
        work.controls = {"control": control}
    with work.clock("finetune"):
        work.finetuning = finetune(
            work.trained,
            training,
            work.original,
            stage.options,
            held_out=held_out,
            state=work.state,
            resume=work.resumed,
            normalisation=work.normalisation,
            progress=progress,
        )


def folded(work: Work) -> None:
    """Fold every BatchNorm, and compare the outputs before and after on up to 1,024 calibration images."""
    with work.clock("fold"):
        verdicts = judge_fold(work.trained, work.plan.input_size)
        work.fused = fold_norms(work.trained, verdicts=verdicts)
        work.fold = FoldCheck.of(work.trained, work.fused, work.batches.first(FOLD_IMAGES), verdicts)


def measured(work: Work) -> None:
    """Measure original and result on the evaluation images, the stages between on a part, and write the report."""
    request, evaluation = work.request, work.request.evaluation
    work.report = report = _report(work)
    stages = {"original": work.original, **work.controls, "swapped": work.attempt.swapped}
    stages["calibrated"] = work.attempt.calibrated
    stages |= {"finetuned": work.trained} if work.finetuning is not None else {}
    work.result = as_given(work.fused, request.model)
    # Parts in different precisions run under the caller's own casts only, so such a model is measured in float32.
    dtypes = {parameter.dtype for parameter in work.result.parameters() if parameter.is_floating_point()}
    stages["fused"] = work.result if len(dtypes) == 1 else work.fused
    worst = WorstImages(evaluation.worst_images)
    known = work.outputs if work.budget else None
    with work.clock("evaluate"):
        report.stages = evaluate_models(
            stages,
            work.source,
            evaluation.amp_dtype,
            request.progress,
            work.total,
            worst,
            known,
            brief=("swapped", "calibrated"),
        )
    if work.source_data is None:
        report.evaluation_data = describe(work.source, report.stages[0].n)
    if evaluation.stress and world()[0] == 0:
        with work.clock("stress"):
            # An iterator is used up.
            source, total = work.source, report.stages[0].n
            if isinstance(work.source, Iterator):
                source, total = work.batches, work.batches.image_count
            images = shuffled(work.named, source, total, evaluation.stress, work.batches[0])
            report.stress = stress_check(work.original, work.fused, images, evaluation, request.progress)
    note_overlap(report, work.named, [request.images, work.training])
    report.worst, work.thumbnails = pictured(worst, work.named, request.model)
    sets = [images for images in (request.images, request.eval_images) if isinstance(images, ImageSet)]
    report.skipped_images = sorted({name for images in sets for name in images.skipped})


def _report(work: Work) -> ConversionReport:
    request, fitted, plan = work.request, work.attempt.fitted, work.plan
    method = request.calibration.method
    rows = plan.to_json(request.ffn_bn)
    return ConversionReport(
        model=request.evaluation.name or plan.model,
        architecture=plan.model,
        method=method,
        ffn_bn=request.ffn_bn,
        calib_samples=work.batches.image_count,
        sites=plan.counts(request.ffn_bn),
        plan=rows["sites"],
        ffns=rows["ffns"],
        calibration_data=work.calibration_data,
        evaluation_data=work.source_data or "",
        fits=fitted.sites,
        layers=fitted.layers,
        stream=fitted.stream,
        reconstruct=request.calibration.reconstruct if method == "reconstruct" else None,
        refine_steps=fitted.refine_steps,
        views=work.views,
        bound=request.calibration.effective_bound,
        finetuning=work.finetuning,
        budget=work.budget,
        created_biases=created_biases(work.original, work.fused),
        stock_timm=work.rebuilt.problem,
        seconds=work.clock.seconds,
        **work.fold.record,
    )


def checked(work: Work) -> Conversion:
    """Return the conversion if everything that was promised holds.

    Raises:
        CheckFailedError: the fold is not exact, or the accuracy budget is not met.
    """
    request, report = work.request, work.report
    budget = request.budget
    inexact = work.fold.problem(request.evaluation.atol)
    if inexact is not None:
        raise CheckFailedError(f"{inexact}: not saved", report)
    conversion = Conversion(
        work.result,
        report,
        work.plan,
        work.trained,
        describe_edits(work.rebuilt.base, work.fused),
        work.batches[0].to(next(work.result.parameters())),
        work.shadow,
        work.rebuilt,
        work.thumbnails,
        work.state if world()[0] == 0 else None,
    )
    first, last = report.stages[0], report.stages[-1]
    missing = budget.missing(last)
    if missing is not None:
        raise CheckFailedError(f"{missing}: not saved", report)
    problem_ = budget.problem(first, last)
    if work.budget is not None:
        work.budget.met = problem_ is None
    limit = request.evaluation.max_stress_drop
    if problem_ is None and limit is not None and report.stress is not None:
        problem_ = report.stress.problem(limit)
    if problem_ is not None:
        search = work.budget
        tried = f", the best of {len(search.trials)} tries with at most {search.max_keep} put back" if search else ""
        raise CheckFailedError(f"{problem_}{tried}", report, conversion)
    return conversion
