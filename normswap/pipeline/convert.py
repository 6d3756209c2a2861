"""The whole road in one call: plan, swap, calibrate, fine-tune, fold, check, report. Each step is in `steps`."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..ambient import known_context
from ..calibration.options import CalibrationOptions
from ..finetuning.options import FinetuneOptions
from ..outputs.rebuild import unwrapped
from ..planning.options import FfnBn
from ..planning.plan import Plan
from ..progress import Progress, no_progress
from ..search.budget import AccuracyBudget
from .conversion import Conversion
from .options import EvaluationOptions, FinetuneStage
from .steps import calibrated, checked, finetuned, folded, measured, prepared
from .work import Request


@known_context()
def convert(
    model: nn.Module,
    images: Iterable[Any],
    *,
    eval_images: Iterable[Any] | None = None,
    plan: Plan | None = None,
    ffn_bn: FfnBn = "pre-act",
    calibration: CalibrationOptions | None = None,
    budget: AccuracyBudget | None = None,
    finetune: FinetuneStage | FinetuneOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Take LayerNorm out of a pretrained model and measure what that cost. ``model`` stays as it is.

    The first batch of everything and one answer of the model are looked at before the work. What the caller has
    switched on in torch, as autocast or inference mode, does not change the result.

    Args:
        model: a timm vision transformer with its weights, or another model with LayerNorms that `torch.export` traces.
            What only runs it in another way (DataParallel, a moving average of timm, `torch.compile`) is taken off.
            One in half precision is converted in float32; the result has its dtypes and the training flag of each of
            its modules again.
        images: calibration images, no labels needed: any iterable of batches `[B, C, H, W]`, normalised as the
            model wants them, or of pairs of images and labels `[B]`; also Hugging Face's batches, numpy arrays, one
            tensor, or a torch `Dataset` of single images, see `normswap.inputs.batches.checked`. All are held in
            memory.
        eval_images: what accuracy and agreement are measured on, in the same form; default: ``images``.
        plan: from `make_plan`, which also takes the LayerNorms to keep; default: all that can go, go.
        ffn_bn: where BatchNorm goes between the FFN's linear layers: "pre-act", "post-act" or "none".
        calibration: how to calibrate.
        budget: what the conversion may cost. If it costs more, the most sensitive LayerNorms stay, as few as are
            found to do, see `normswap.search.budget`; fine-tuning comes after that.
        finetune: fine-tune after calibration, on ``images`` or on what a `FinetuneStage` names; default: do not.
        evaluation: how the result is measured, checked and described.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: an invalid argument, or no images.
        ModelRefusedError, NoLayerNormError: see `make_plan`.
        CalibrationError, FoldError: statistics, training or folded weights that are not finite.
        CheckpointError, OutputError, MissingExtraError: from `normswap.finetune`.
        CheckFailedError: the fold is not exact, fused and unfused differ by more than ``evaluation.atol``, or the
            accuracy budget is not met; its ``report`` holds what was measured, and its ``conversion`` what misses
            nothing but the budget.

    >>> from normswap.demo import FOLDER, MODEL
    >>> model = normswap.load_model(MODEL)
    >>> images = normswap.load_images(model, FOLDER, "train").draw(40, seed=0)
    >>> result = convert(model, images, calibration=CalibrationOptions(method="channel"))
    >>> [type(module).__name__ for module in result.model.modules() if isinstance(module, nn.LayerNorm)]
    []
    >>> [stage.name for stage in result.report.stages]
    ['original', 'swapped', 'calibrated', 'fused']
    """
    stage = FinetuneStage(finetune) if isinstance(finetune, FinetuneOptions) else finetune
    request = Request(
        unwrapped(model),
        images,
        eval_images,
        plan,
        ffn_bn,
        calibration or CalibrationOptions(),
        budget or AccuracyBudget(),
        stage,
        evaluation or EvaluationOptions(),
        progress,
    )
    work = prepared(request)
    calibrated(work)
    finetuned(work)
    folded(work)
    measured(work)
    return checked(work)
