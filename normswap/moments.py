"""Mean, variance and covariance per channel, in float64, by a merge that survives large means.

Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equations 1.5: two parts merge by their
means and their sums of squared deviations. E[x^2] - E[x]^2 in float32 would be negative for a channel with mean
10,000 and variance 0.01, and the residual stream of a ViT has such channels. The result does not depend on how the
samples are split into batches, up to float64 rounding.
"""

import torch


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

    def update(self, samples: torch.Tensor) -> torch.Tensor:
        """Add samples `[M, C]` of any dtype; return them centred on the mean of this batch, `[M, C]` float64."""
        x = _float64(samples)
        if self.count == 0:
            self.mean = x.new_zeros(x.shape[1])
            self._sum_sq = self.mean.clone()
        mean = x.mean(0)
        centred = x - mean
        delta, total = mean - self.mean, self.count + len(x)
        self._sum_sq = self._sum_sq + centred.square().sum(0) + delta.square() * (self.count * len(x) / total)
        self.mean = self.mean + delta * (len(x) / total)
        self.count = total
        return centred

    @property
    def var(self) -> torch.Tensor:
        """Population (biased) variance `[C]`."""
        return self._sum_sq / max(self.count, 1)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self._sum_sq).all())


class JointMoments:
    """Running moments of paired channels x and y, both `[M, C]`, and their covariance channel by channel."""

    def __init__(self) -> None:
        self.x, self.y = Moments(), Moments()
        self._sum_xy = torch.zeros(0, dtype=torch.float64)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add paired samples `[M, C]`."""
        count, mean_x, mean_y = self.x.count, self.x.mean, self.y.mean
        centred_x, centred_y = self.x.update(x), self.y.update(y)
        product = (centred_x * centred_y).sum(0)
        if count:
            total = self.x.count
            # The batch means, recovered from the merged ones: delta * M / total is how far each mean moved.
            moved_x, moved_y = self.x.mean - mean_x, self.y.mean - mean_y
            product = product + self._sum_xy + moved_x * moved_y * (count * total / len(x))
        self._sum_xy = product

    @property
    def cov(self) -> torch.Tensor:
        """Population covariance of x and y, `[C]`."""
        return self._sum_xy / max(self.x.count, 1)

    @property
    def finite(self) -> bool:
        return self.x.finite and self.y.finite and bool(torch.isfinite(self._sum_xy).all())


def _float64(samples: torch.Tensor) -> torch.Tensor:
    # Apple's GPUs have no float64.
    return (samples.cpu() if samples.device.type == "mps" else samples).double()
