"""The conversions that are tried for an accuracy budget: made, calibrated, folded and measured."""

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import calibrate
from ..calibration.options import CalibrationOptions
from ..distributed import from_first
from ..errors import CheckFailedError
from ..evaluation.evaluate import evaluate_models
from ..inputs.batches import ImageBatches
from ..planning.foldability import KEEP
from ..planning.options import FfnBn
from ..planning.plan import Plan, keep_more
from ..progress import Progress
from ..records.budget import BudgetRecord, SiteCost, Trial
from ..records.report import Calibration
from ..surgery.fold import fold_norms
from ..surgery.swap import swap_norms
from .budget import AccuracyBudget, Search
from .sensitivity import IMAGES, site_costs

# Why a LayerNorm stays that could go.
FOR_THE_BUDGET = "stays for the accuracy budget"


@dataclass
class Attempt:
    """One calibrated conversion, not yet fine-tuned or folded for good.

    Attributes:
        plan: what it was made by.
        swapped: the model with BatchNorm in, not calibrated.
        calibrated: the same, calibrated.
        fitted: how well.
        seconds: what calibration took.
    """

    plan: Plan
    swapped: nn.Module
    calibrated: nn.Module
    fitted: Calibration
    seconds: float

    @classmethod
    def make(
        cls,
        original: nn.Module,
        plan: Plan,
        batches: ImageBatches,
        ffn_bn: FfnBn,
        options: CalibrationOptions,
        progress: Progress,
    ) -> "Attempt":
        """Swap and calibrate; see `normswap.convert` for the arguments and `normswap.calibrate` for the errors."""
        swapped = swap_norms(original, plan, ffn_bn)
        calibrated = copy.deepcopy(swapped)
        start = time.perf_counter()
        fitted = calibrate(calibrated, batches, original, options, progress)
        return cls(plan, swapped, calibrated, fitted, round(time.perf_counter() - start, 3))


@dataclass
class Trials:
    """Makes and measures conversions for a `Search`.

    Attributes:
        budget: what to hold.
        original: in eval mode.
        plan: of the first trial, which keeps nothing for the budget.
        batches: calibration images `[B, C, H, W]`.
        ffn_bn, options: of every trial.
        images: what the trials are measured on; gone through once for each.
        amp_dtype: autocast to it in the evaluation.
        answers: the original's, see `evaluate_models`.
        progress: called with ("search: ...", trials done, trials at most).
        total: how many evaluation images there will be, for the progress.
    """

    budget: AccuracyBudget
    original: nn.Module
    plan: Plan
    batches: ImageBatches
    ffn_bn: FfnBn
    options: CalibrationOptions
    images: Iterable[Any]
    amp_dtype: torch.dtype | None
    answers: dict[int, torch.Tensor]
    progress: Progress
    total: int
    done: int = 0

    def search(self) -> tuple[BudgetRecord, Attempt]:
        """Return what was tried, and the best of it.

        Raises:
            CheckFailedError: the images or the model do not allow to judge the budget.
            CalibrationError, FoldError: from a trial.
        """
        candidates = [site.path for site in self.plan.swapped_sites]
        return Search(self.budget, candidates, self.measure, self.costs).run()

    def measure(self, put_back: Sequence[str]) -> tuple[Trial, Attempt]:
        """Convert with some LayerNorms put back, and measure the fused model against the original."""
        start = time.perf_counter()
        show = self._within(f"{len(put_back)} LayerNorms put back")
        plan = keep_more(self.original, self.plan, put_back, FOR_THE_BUDGET)
        attempt = Attempt.make(self.original, plan, self.batches, self.ffn_bn, self.options, show)
        fused = fold_norms(attempt.calibrated, input_size=plan.input_size)
        models = {"original": self.original, "fused": fused}
        first, last = evaluate_models(models, self.images, self.amp_dtype, show, self.total, answers=self.answers)
        missing = self.budget.missing(last)
        if missing is not None:
            raise CheckFailedError(f"{missing}: not saved")
        self.done += 1
        kept = [site.path for site in plan.sites if site.verdict == KEEP]
        trial = self.budget.trial(kept, len(put_back), first, last, time.perf_counter() - start)
        # All processes have to go the same way, whatever their last bits are.
        short = from_first(torch.tensor(trial.shortfall, dtype=torch.float64, device=self.batches[0].device))
        return replace(trial, shortfall=float(short)), attempt

    def costs(self, attempt: Attempt | None, sites: Sequence[str]) -> list[SiteCost]:
        """Rank LayerNorms of the original, or of one conversion in which they were put back."""
        model = self.original if attempt is None else attempt.calibrated
        few = self.batches.first(IMAGES)
        return site_costs(model, self.original, self.plan, sites, few, self._within("which LayerNorms cost most"))

    def _within(self, what: str) -> Progress:
        """Return a progress that shows a step inside the search as text beside the search's own bar."""

        def show(step: str, done: int, total: int) -> None:
            self.progress(f"search: {what}; {step} {done}/{total}", self.done, self.budget.max_evaluations)

        return show
