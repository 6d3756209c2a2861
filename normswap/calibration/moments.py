"""Mean, variance and covariance per channel, in float64, by a merge that survives large means.

Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equations 1.5: two parts merge by their
means and their sums of squared deviations. E[x^2] - E[x]^2 in float32 would be negative for a channel with mean
10,000 and variance 0.01, and the residual stream of a ViT has such channels. The result does not depend on how the
samples are split into batches, up to rounding of the samples' dtype.
"""

import torch

from ..distributed import all_sum
from ..model_utils import widened

# Samples to give at once where there is a choice: so many rows stay in the processor's cache from step to step.
CACHED_ROWS = 1024


class Moments:
    """Running mean and variance of the channels of `[M, C]` samples.

    Attributes:
        count: samples so far.
        mean: `[C]`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._sum_sq = self.mean
        self._pivot = self.mean

    def update(self, samples: torch.Tensor) -> torch.Tensor:
        """Add samples `[M, C]` of any dtype; return them centred on the mean of this batch, `[M, C]`.

        Within a batch everything is a difference from a pivot (the first batch's mean) in the samples' dtype, float32
        at least, so a large mean cancels in the data before anything is summed; batches merge in float64.
        """
        x = widened(samples.cpu() if samples.device.type == "mps" else samples)  # Apple's GPUs have no float64
        if not len(x):  # a process may see no rows of a kind; the others' have to be added to something of their shape
            if not self.count:
                self.mean = self._sum_sq = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            return x
        if self.count == 0:
            self._pivot = x.mean(0, dtype=torch.float64).to(x.dtype)
            self.mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self._sum_sq = self.mean.clone()
        centred = x - self._pivot
        offset = centred.mean(0)
        centred -= offset
        mean = self._pivot.double() + offset.double()
        delta, total = mean - self.mean, self.count + len(x)
        spread = centred.square().sum(0).double()
        self._sum_sq = self._sum_sq + spread + delta.square() * (self.count * len(x) / total)
        self.mean = self.mean + delta * (len(x) / total)
        self.count = total
        return centred

    def reduce(self) -> None:
        """Merge with all other processes."""
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.mean.device)
        mean = self.mean * count
        all_sum(count, mean)
        mean = mean / count.clamp(min=1)
        self._sum_sq = self._sum_sq + self.count * (self.mean - mean).square()
        all_sum(self._sum_sq)
        self.mean, self.count = mean, int(count)

    @property
    def var(self) -> torch.Tensor:
        """Population (biased) variance `[C]`."""
        return self._sum_sq / max(self.count, 1)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self._sum_sq).all())


class JointMoments:
    """Running moments of channels x and of one or more targets y, all `[M, C]`, and their covariances with x.

    Attributes:
        x: moments of x.
        y: moments of each target.
    """

    def __init__(self, targets: int = 1) -> None:
        self.x = Moments()
        self.y = tuple(Moments() for _ in range(targets))
        self._sum_xy = [torch.zeros(0, dtype=torch.float64)] * targets

    def update(self, x: torch.Tensor, *targets: torch.Tensor) -> None:
        """Add samples `[M, C]` of x and, in pairs with them, of every target."""
        count, mean_x = self.x.count, self.x.mean
        centred_x = self.x.update(x)
        for i, (moments, target) in enumerate(zip(self.y, targets, strict=True)):
            mean_y = moments.mean
            product = (centred_x * moments.update(target)).sum(0).double()
            if count and not len(x):
                product = self._sum_xy[i]
            elif count:
                # How far the merged mean moved is (distance of the batch mean) * M / total, so this is Chan's
                # distance_x * distance_y * count * M / total.
                moved_x, moved_y = self.x.mean - mean_x, moments.mean - mean_y
                product = product + self._sum_xy[i] + moved_x * moved_y * (count * self.x.count / len(x))
            self._sum_xy[i] = product

    def reduce(self) -> None:
        """Merge with all other processes."""
        here = [(self.x.count, self.x.mean, y.mean) for y in self.y]
        for moments in (self.x, *self.y):
            moments.reduce()
        for i, (count, mean_x, mean_y) in enumerate(here):
            self._sum_xy[i] = self._sum_xy[i] + count * (mean_x - self.x.mean) * (mean_y - self.y[i].mean)
        all_sum(*self._sum_xy)

    @property
    def cov(self) -> tuple[torch.Tensor, ...]:
        """Population covariance of x and each target, `[C]`."""
        return tuple(sum_xy / max(self.x.count, 1) for sum_xy in self._sum_xy)

    @property
    def finite(self) -> bool:
        sums_finite = all(bool(torch.isfinite(sum_xy).all()) for sum_xy in self._sum_xy)
        return self.x.finite and all(y.finite for y in self.y) and sums_finite


def r_squared(residual: float, total: float) -> float:
    """Return the share of a sum of squares that a fit explains, given what it leaves; 1 or 0 where there is nothing.

    >>> r_squared(1.0, 4.0), r_squared(0.0, 0.0), r_squared(1.0, 0.0)
    (0.75, 1.0, 0.0)
    """
    return 1 - residual / total if total > 0 else float(residual == 0)
