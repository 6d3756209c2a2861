"""What `convert` keeps of a finished calibration in the file of a training run, so that it need not be done again."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.options import CalibrationOptions
from ..finetuning.options import goes_on
from ..finetuning.run_state import TrainingState
from ..outputs.swapped_checkpoint import describe_swapped, read_budget, rebuild_swapped
from ..planning.foldability import KEEP
from ..planning.options import FfnBn
from ..planning.plan import Plan, keep_more
from ..records.budget import BudgetRecord
from ..records.report import Calibration, LayerFit, SiteFit, StreamError
from ..search.budget import AccuracyBudget
from ..search.trials import FOR_THE_BUDGET, Attempt
from ..surgery.swap import swap_norms
from .options import FinetuneStage

_KINDS: dict[str, Any] = {"sites": SiteFit, "layers": LayerFit, "stream": StreamError}


def opened(stage: FinetuneStage | None, fingerprint: dict[str, Any]) -> tuple[TrainingState | None, bool]:
    """Return the file of the run, None where none is kept, and whether it is gone on from; before any work.

    Args:
        stage: the fine-tuning; None without.
        fingerprint: from `calibration_fingerprint`.

    Raises:
        CheckpointError: there is nothing to go on from, it is truncated, or of another run.
    """
    if stage is None or stage.state is None:
        return None, False
    kept = TrainingState(Path(stage.state), stays=True)
    resumed = goes_on(stage.state, stage.resume)
    if resumed:
        kept.load_calibration(fingerprint)
    return kept, resumed


def calibration_fingerprint(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[torch.Tensor],
    ffn_bn: FfnBn,
    options: CalibrationOptions,
    budget: AccuracyBudget,
    evaluated_on: str | None,
) -> dict[str, Any]:
    """Return what must be the same for a calibration to be taken up; the memory budget changes nothing."""
    weights = [tensor.double().sum() for tensor in model.state_dict().values() if tensor.numel()]
    plain = {key: str(value) for key, value in asdict(options).items() if key != "memory_budget"}
    return {
        "calibration options": plain | {"ffn_bn": ffn_bn},
        "accuracy budget": [str(value) for value in asdict(budget).values()],
        "plan": [[site.path, site.verdict] for site in plan.sites],
        # As text: a number that is none would differ from itself.
        "images": [str(float(batch.double().sum())) for batch in batches] + [str(evaluated_on)],
        "weights": [str(float(total)) for total in weights],
    }


def remember(
    kept: TrainingState,
    fingerprint: dict[str, Any],
    original: nn.Module,
    attempt: Attempt,
    budget: BudgetRecord | None,
    seconds: dict[str, float],
) -> None:
    """Write a calibration into the file, before training begins.

    Raises:
        ArgumentError, OutputError: see `TrainingState.save`.
    """
    kept.calibration = {
        "fingerprint": fingerprint,
        "weights": attempt.calibrated.state_dict(),
        "model": describe_swapped(original, attempt.calibrated),
        "keep": [site.path for site in attempt.plan.sites if site.verdict == KEEP],
        "fitted": asdict(attempt.fitted),
        "budget": None if budget is None else asdict(budget),
        "seconds": {"calibrate": attempt.seconds, **seconds},
    }
    kept.save(None)


def recall(
    calibration: dict[str, Any], original: nn.Module, plan: Plan, ffn_bn: FfnBn
) -> tuple[Attempt, BudgetRecord | None, dict[str, float]]:
    """Return the calibrated conversion that a file kept, the record of its search, and the seconds that both took."""
    had = {site.path for site in plan.sites if site.verdict == KEEP}
    plan = keep_more(original, plan, [path for path in calibration["keep"] if path not in had], FOR_THE_BUDGET)
    swapped = swap_norms(original, plan, ffn_bn)
    model = rebuild_swapped(copy.deepcopy(swapped), calibration["model"])
    model.load_state_dict(calibration["weights"], strict=True)
    rows = {key: [kind(**row) for row in calibration["fitted"][key]] for key, kind in _KINDS.items()}
    fitted = Calibration(**calibration["fitted"] | rows)
    budget = None if calibration["budget"] is None else read_budget(calibration["budget"])
    seconds = dict(calibration["seconds"])
    return Attempt(plan, swapped, model, fitted, seconds.pop("calibrate")), budget, seconds
