"""What was tried to hold an accuracy budget: which LayerNorms stay against how accurate the model then is.

Accuracy and agreement are in percent, differences in points, times in seconds, divergences in nats.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SiteCost:
    """What one LayerNorm costs when it alone gives way to BatchNorm.

    Attributes:
        site: module path.
        kl: mean KL from the original's answers on some of the calibration images.
    """

    site: str
    kl: float


@dataclass(frozen=True)
class Trial:
    """One conversion that was measured on the evaluation images.

    Attributes:
        kept: every LayerNorm in it, in the order of the model, those of ``--keep`` among them.
        put_back: how many of them stay for the budget alone.
        top1: percent; None without labels.
        drop: points of top-1 below the original; None without labels.
        agreement: percent of images with the original's answer.
        error: bound on the standard error of ``drop`` and ``agreement``, in points. Only images whose answer changed
            can change ``drop``, so its variance over n images is at most (share of changed answers) / n.
        kl: mean KL from the original's answers.
        shortfall: points by which it misses the budget; 0 or less where it holds.
        seconds: what the trial took, from swap to measurement.
    """

    kept: list[str]
    put_back: int
    top1: float | None
    drop: float | None
    agreement: float | None
    error: float | None
    kl: float | None
    shortfall: float
    seconds: float


@dataclass
class BudgetRecord:
    """The search as a whole.

    Attributes:
        max_drop, min_agreement: the budget.
        max_keep: how many LayerNorms could go back at most.
        max_evaluations: how many trials there could be.
        candidates: how many LayerNorms could go either way.
        costs: the ranking that the search went by, the worst first; empty if the first trial held the budget.
        trials: in the order in which they were made.
        chosen: index of the trial that the result comes from.
        met: whether the result, fine-tuned if that was asked for, then or later, holds the budget.
    """

    max_drop: float | None
    min_agreement: float | None
    max_keep: int
    max_evaluations: int
    candidates: int
    costs: list[SiteCost] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    chosen: int = 0
    met: bool = False

    @property
    def best(self) -> Trial:
        """The trial that the result comes from."""
        return self.trials[self.chosen]
