"""Ridge least squares of a linear layer from sums over tokens, so any number of images and processes add up.

For a layer with inputs x `[M, K]` and wanted outputs y `[M, O]` all that is needed are the second moments
``sum x x'`` `[K, K]` and ``sum x y'`` `[K, O]`. They are taken about a pivot close to the mean (the first batch's
mean, shared by all processes), so that large means cancel in the data and not in the sums. Products within a batch
run in the data's dtype, sums over batches in float64: with float32 data an entry is off by about 1e-7 of its scale,
four orders below the weakest penalty of `PENALTIES`.
"""

from dataclasses import dataclass

import torch

from .distributed import all_sum, from_first

# Relative to the mean square of each input channel. The largest leaves a layer nearly as it was.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Each product is made of blocks this wide; of the symmetric one only the upper blocks are computed.
_BLOCK = 512
# The penalty is chosen on so many outputs; all of them would cost as much as the solution itself.
_CHOSEN_ON = 64


class Gram:
    """Sums of products of inputs x `[M, K]` and targets y `[M, O]`, about a pivot.

    Args:
        pivot_x, pivot_y: any point near the means, `[K]` and `[O]`.
    """

    def __init__(self, pivot_x: torch.Tensor, pivot_y: torch.Tensor) -> None:
        self.pivot_x, self.pivot_y = pivot_x, pivot_y
        k, o = len(pivot_x), len(pivot_y)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=pivot_x.device)

        self.count = zeros()
        self.x, self.y = zeros(k), zeros(o)
        self.xx, self.xy, self.yy = zeros(k, k), zeros(k, o), zeros(o)

    @staticmethod
    def like(x: torch.Tensor, y: torch.Tensor) -> "Gram":
        """Return an empty one with the means of this batch, `[M, K]` and `[M, O]`, as pivot, on every process."""
        pivots = (t.mean(0, dtype=_accumulate(t)).to(t.dtype) for t in (x, y))
        return Gram(*(from_first(pivot) for pivot in pivots))

    def empty(self) -> "Gram":
        """Return an empty one about the same pivot."""
        return Gram(self.pivot_x, self.pivot_y)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add inputs `[M, K]` and targets `[M, O]`."""
        x, y = x - self.pivot_x, y - self.pivot_y
        self.count += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.yy += y.square().sum(0, dtype=torch.float64)
        self.xy += x.T @ y
        for start in range(0, x.shape[1], _BLOCK):
            end = start + _BLOCK
            self.xx[start:end, start:] += x[:, start:end].T @ x[:, start:]

    def reduce(self) -> "Gram":
        """Add the sums of all processes, in place."""
        all_sum(self.count, self.x, self.y, self.xx, self.xy, self.yy)
        return self

    def __add__(self, other: "Gram") -> "Gram":
        """Return the sums of both; they must have the same pivot."""
        total = self.empty()
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means of x `[K]` and y `[O]`, float64."""
        n = self.count.clamp(min=1)
        return self.pivot_x.double() + self.x / n, self.pivot_y.double() + self.y / n

    def about(self, x: torch.Tensor, y: torch.Tensor) -> "Moments2":
        """Return the mean products of x and y about the given points `[K]` and `[O]`, float64."""
        n = self.count.clamp(min=1)
        at_x, at_y = x - self.pivot_x.double(), y - self.pivot_y.double()
        mean_x, mean_y = self.x / n, self.y / n
        upper = self.xx.triu()
        xx = (upper + upper.T - upper.diagonal().diag()) / n
        # E[(x - a)(x - a)'] with a measured from the pivot
        xx = xx - torch.outer(mean_x, at_x) - torch.outer(at_x, mean_x) + torch.outer(at_x, at_x)
        xy = self.xy / n - torch.outer(mean_x, at_y) - torch.outer(at_x, mean_y) + torch.outer(at_x, at_y)
        yy = self.yy / n - 2 * at_y * mean_y + at_y.square()
        return Moments2(xx, xy, yy)

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in (self.x, self.y, self.xx, self.xy, self.yy))


@dataclass(frozen=True)
class Moments2:
    """Mean products of x with x `[K, K]`, of x with y `[K, O]`, of each y with itself `[O]`."""

    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error `[O]` of ``x @ weight.T`` for weight `[O, K]`."""
        return self.yy - 2 * (weight.T * self.xy).sum(0) + ((self.xx @ weight.T) * weight.T).sum(0)


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        weight, bias: `[O, K]` and `[O]`, float64; without intercept the bias is 0.
        penalty: the one that was best on the tokens held out.
        r2_before, r2: share of the targets' variance that the layer explained before, and explains now.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float
    r2_before: float
    r2: float


def solve(fit: Gram, held_out: Gram, weight: torch.Tensor, bias: torch.Tensor, intercept: bool = True) -> Solution:
    """Return the linear layer that gives the targets best, drawn towards the layer as it is.

    Minimises the mean of ``|y - W x - b|^2`` plus ``penalty * sum_k v_k |W_k - weight_k|^2``, where v_k is the
    variance of input channel k. The penalty is the one of `PENALTIES` whose solution on ``fit`` errs least on
    ``held_out``; the solution uses both. A channel that never varies keeps its weights, and so does any direction
    the data do not have: the penalty is what decides there.

    Args:
        fit, held_out: from disjoint sets of images, with the same pivot.
        weight, bias: `[O, K]` and `[O]`, the layer before.
        intercept: False to leave the bias as it is (a layer without one has zeros).
    """
    weight, bias = weight.detach().double(), bias.detach().double()
    if not held_out.count:
        held_out = fit
    outputs = torch.linspace(0, len(weight) - 1, min(len(weight), _CHOSEN_ON)).long().to(weight.device)
    centre = _centre(fit, bias, intercept)
    moments = fit.about(*centre)
    part = Moments2(moments.xx, moments.xy[:, outputs], moments.yy[outputs])
    test = held_out.about(*centre)
    test = Moments2(test.xx, test.xy[:, outputs], test.yy[outputs])
    errors = [float(test.error(_ridge(part, weight[outputs], p)).sum()) for p in PENALTIES]
    penalty = PENALTIES[errors.index(min(errors))]
    total = fit + held_out if held_out is not fit else fit
    centre = _centre(total, bias, intercept)
    moments = total.about(*centre)
    solved = _ridge(moments, weight, penalty)
    shift = centre[1] - solved @ centre[0] if intercept else torch.zeros_like(bias)
    mean_x, mean_y = total.means()
    spread = total.about(mean_x, mean_y)
    r2_before, r2 = (
        _r2(spread, w, mean_y - w @ mean_x - b) for w, b in ((weight, bias), (solved, shift if intercept else bias))
    )
    return Solution(solved, shift, penalty, r2_before, r2)


def _centre(gram: Gram, bias: torch.Tensor, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points to measure x and y from: their means, or 0 and the bias where the bias is fixed."""
    means = gram.means()
    return means if intercept else (torch.zeros_like(means[0]), bias)


# A variance below this is rounding.
_NOTHING = 1e-30


def _ridge(moments: Moments2, weight: torch.Tensor, penalty: float) -> torch.Tensor:
    var = moments.xx.diagonal()
    # A channel that never varies has no scale of its own; the mean one keeps the system regular.
    scale = torch.where(var > 1e-14 * var.max(), var, var.mean())
    # Where no channel varies, as behind a norm over a single channel, a division by next to nothing would make weights.
    scale = torch.where(scale > _NOTHING, scale, 1.0).rsqrt()
    system = moments.xx * scale * scale[:, None]
    system.diagonal().add_(penalty)
    missing = (moments.xy - moments.xx @ weight.T) * scale[:, None]  # [K, O]
    step = torch.cholesky_solve(missing, torch.linalg.cholesky(system))
    return weight + (step * scale[:, None]).T


def _r2(spread: Moments2, weight: torch.Tensor, offset: torch.Tensor) -> float:
    total = float(spread.yy.sum())
    left = float((spread.error(weight) + offset.square()).sum())
    return 1 - max(left, 0.0) / total if total > 0 else float(left == 0)  # rounding may leave less than nothing


def _accumulate(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.device.type != "mps" else torch.float32
