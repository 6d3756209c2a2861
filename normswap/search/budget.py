"""Hold an accuracy budget: put back the LayerNorms that cost most, and find how few will do.

The most sensitive LayerNorms are found without labels (see `normswap.search.sensitivity`). How many of them have to
stay is then searched by bisection, each time with calibration done anew, since every BatchNorm downstream sees other
activations. Accuracy need not rise with every LayerNorm that stays, so nothing is taken on trust: each trial is
measured, and of those that hold the budget the one with the fewest LayerNorms wins.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import ArgumentError
from ..records.budget import BudgetRecord, SiteCost, Trial
from ..records.report import StageMetrics

NO_HEAD = "`min_agreement` needs a model with classes, and this one has no head"

_CHEAPEST = 2

T = TypeVar("T")


@dataclass(frozen=True)
class AccuracyBudget:
    """What a conversion may cost.

    Attributes:
        max_drop: largest tolerated loss of top-1, in points; None for no limit.
        min_agreement: least percent of images with the original's answer; None for no limit.
        max_keep: how many LayerNorms may go back for it, those that the plan keeps not counted; 0 to check only;
            None for all but one.
        max_evaluations: how many conversions may be tried, the first one included.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    max_keep: int | None = None
    max_evaluations: int = 8

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ArgumentError: a number out of its range, or limits of a search without a budget to search for.
        """
        if self.max_drop is not None and math.isnan(self.max_drop):
            raise ArgumentError(f"`max_drop` must be a number, not {self.max_drop}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 100:
            raise ArgumentError(f"`min_agreement` must be a percentage from 0 to 100, not {self.min_agreement:g}")
        if self.max_keep is not None and self.max_keep < 0:
            raise ArgumentError(f"`max_keep` must be 0 or more LayerNorms, not {self.max_keep}")
        if self.max_evaluations < 1:
            raise ArgumentError(f"`max_evaluations` must be 1 or more, not {self.max_evaluations}")
        if self.empty and self.max_keep is not None:
            raise ArgumentError("`max_keep` needs `max_drop` or `min_agreement`")

    @property
    def empty(self) -> bool:
        """Whether there is nothing to hold."""
        return self.max_drop is None and self.min_agreement is None

    def limit(self, candidates: int) -> int:
        """Return how many of so many LayerNorms may go back; one at least has to go, or nothing is converted."""
        if self.empty:
            return 0
        return candidates - 1 if self.max_keep is None else min(self.max_keep, candidates - 1)

    def missing(self, last: StageMetrics) -> str | None:
        """Return what stands in the way of a judgement, None if nothing does."""
        if self.max_drop is not None and last.top1 is None:
            return "`max_drop` needs labels, and there are none"
        if self.min_agreement is not None and last.agreement is None:
            return NO_HEAD
        return None

    def shortfall(self, first: StageMetrics, last: StageMetrics) -> float:
        """Return by how many points ``last`` misses the budget; 0 or less if it holds."""
        return max((have - limit for have, limit, _ in self._limits(first, last)), default=0.0)

    def problem(self, first: StageMetrics, last: StageMetrics) -> str | None:
        """Say how ``last`` misses the budget, None if it holds."""
        missed = [text for have, limit, text in self._limits(first, last) if not have <= limit]
        return " and ".join(missed) or None

    def trial(
        self, kept: Sequence[str], put_back: int, first: StageMetrics, last: StageMetrics, seconds: float
    ) -> Trial:
        """Return the record of one conversion from what was measured of the original and of it."""
        drop = None if first.top1 is None or last.top1 is None else first.top1 - last.top1
        changed = None if last.agreement is None else 1 - last.agreement / 100
        error = None if changed is None else 100 * math.sqrt(max(changed, 0.0) / last.n)
        short = self.shortfall(first, last)
        return Trial(list(kept), put_back, last.top1, drop, last.agreement, error, last.kl, short, round(seconds, 3))

    def _limits(self, first: StageMetrics, last: StageMetrics) -> list[tuple[float, float, str]]:
        """Return each loss, its limit and the words for a miss."""
        limits = []
        if self.max_drop is not None and first.top1 is not None and last.top1 is not None:
            drop = round(first.top1 - last.top1, 5)  # 1.0000001 for what is 1: shares come from float32
            words = f"top-1 fell by {drop:.2f} points, more than `max_drop` {self.max_drop:g}"
            limits.append((drop, self.max_drop, words))
        if self.min_agreement is not None and last.agreement is not None:
            words = f"top-1 agreement is {last.agreement:.2f} %, less than `min_agreement` {self.min_agreement:g}"
            limits.append((100 - last.agreement, 100 - self.min_agreement, words))
        return limits


class Search(Generic[T]):
    """Finds the fewest LayerNorms that have to stay.

    Args:
        budget: what to hold.
        candidates: paths of the LayerNorms that can go either way.
        attempt: converts with the LayerNorms given put back, and returns what was measured and the conversion.
        costs: ranks LayerNorms, given the conversion in which they are (None for the original) and their paths.
    """

    def __init__(
        self,
        budget: AccuracyBudget,
        candidates: Sequence[str],
        attempt: Callable[[Sequence[str]], tuple[Trial, T]],
        costs: Callable[[T | None, Sequence[str]], list[SiteCost]],
    ) -> None:
        self.budget, self.candidates, self.attempt, self.costs = budget, list(candidates), attempt, costs
        limit = budget.limit(len(candidates))
        self.record = BudgetRecord(
            budget.max_drop, budget.min_agreement, limit, budget.max_evaluations, candidates=len(candidates)
        )
        self.tried: list[set[str]] = []
        self.best: T | None = None

    def run(self) -> tuple[BudgetRecord, T]:
        """Return the record and the best conversion: of those that hold the budget the one with the fewest LayerNorms.

        If none does, the one that misses it least. Only the best so far is kept in memory.
        """
        if not self._try([]) and self.record.max_keep and self._left:
            ranking = self.costs(None, self.candidates)
            self.record.costs = sorted(ranking, key=lambda cost: -cost.kl)
            self._bisect([cost.site for cost in self.record.costs])
            self._thin_out()
        best = self.best
        assert best is not None  # the first trial is always made
        return self.record, best

    @property
    def _left(self) -> int:
        return self.record.max_evaluations - len(self.record.trials)

    def _bisect(self, ranked: list[str]) -> None:
        """Find the smallest k for which the k most sensitive LayerNorms are enough."""
        low, high, known = 0, self.record.max_keep, False  # low fails; known: high holds
        while self._left and high - low > known:
            # The last evaluation, if none held yet, goes to the most that may stay.
            k = high if not known and self._left == 1 else (low + high + (not known)) // 2
            if self._try(ranked[:k]):
                high, known = k, True
            else:
                low = k

    def _thin_out(self) -> None:
        """Let one more LayerNorm go at a time, the one that costs least in the best conversion so far.

        The first ranking was made with all others in place, this one is made where they are gone. Where the two
        least sensitive cost too much, the others will too.
        """
        while self._left and self.record.best.shortfall <= 0 and self.record.best.put_back:
            kept = [site for site in self.candidates if site in self.tried[self.record.chosen]]
            costs = sorted(self.costs(self.best, kept), key=lambda cost: cost.kl)
            fewer = [[site for site in kept if site != cost.site] for cost in costs[:_CHEAPEST]]
            if not any(self._left and self._try(sites) for sites in fewer if set(sites) not in self.tried):
                return

    def _try(self, put_back: list[str]) -> bool:
        """Convert, measure and remember; return whether the budget holds."""
        trial, result = self.attempt(put_back)
        trials = self.record.trials
        trials.append(trial)
        self.tried.append(set(put_back))
        if len(trials) == 1 or _rating(trial) < _rating(self.record.best):
            self.record.chosen, self.best = len(trials) - 1, result
        return trial.shortfall <= 0


def _rating(trial: Trial) -> tuple[bool, int, float]:
    missed = not trial.shortfall <= 0
    return missed, 0 if missed else trial.put_back, trial.shortfall
