"""Ridge least squares of a linear layer from sums over tokens, so any number of images and processes add up.

For a layer with inputs x `[M, K]` and wanted outputs y `[M, O]` all that is needed are the second moments
``sum x x'`` `[K, K]` and ``sum x y'`` `[K, O]`. They are taken about a pivot close to the mean (the first batch's
mean, shared by all processes), so that large means cancel in the data and not in the sums. Products of a few batches
are summed in the data's dtype (see `fast_products`), the rest in float64.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..distributed import all_sum, from_first
from ..errors import CalibrationError
from .moments import r_squared

# Relative to the mean square of each input channel. The largest leaves a layer nearly as it was.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0)
# Each product is made of blocks this wide; of the symmetric one only the upper blocks are computed.
_BLOCK = 512
# So many batches are summed in the data's dtype before they join the float64 sum.
_RECENT = 8
# The penalty is chosen, and the fit reported, on so many outputs at most; all would cost as much as the solution.
_CHOSEN_ON = 64


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 matrix products use the processor's bfloat16 or TF32 units, where it has them.

    Each factor is then rounded to 8 bits at least, the sums are float32. To a least-squares problem that is noise of
    variance 1e-6 (relative to a channel's own mean square about the pivot), a hundredth of the weakest penalty. Only
    the sums may have that: in the models' own passes it is noise that images without variation are then fitted to.
    float64 products stay as they are.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Gram:
    """Sums of products of inputs x `[M, K]` and targets y `[M, O]`, about a pivot.

    Args:
        pivot_x, pivot_y: any point near the means, `[K]` and `[O]`.
    """

    def __init__(self, pivot_x: torch.Tensor, pivot_y: torch.Tensor) -> None:
        self.pivot_x, self.pivot_y = pivot_x, pivot_y
        k, o = len(pivot_x), len(pivot_y)
        self.count, self.x, self.y, self.xx, self.xy, self.yy = (
            torch.zeros(size, dtype=torch.float64, device=pivot_x.device)
            for size in ((), (k,), (o,), (k, k), (k, o), (o,))
        )
        # Large products of the last few batches, in the data's dtype: a float64 sum of each would cost as much again.
        self._recent: tuple[torch.Tensor, torch.Tensor] | None = None
        self._batches = 0

    @staticmethod
    def like(x: torch.Tensor, y: torch.Tensor) -> "Gram":
        """Return an empty one with the means of this batch, `[M, K]` and `[M, O]`, as pivot, on every process."""
        return Gram(*(from_first(t.mean(0, dtype=torch.float64).to(t.dtype)) for t in (x, y)))

    def empty(self) -> "Gram":
        """Return an empty one about the same pivot."""
        return Gram(self.pivot_x, self.pivot_y)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add inputs `[M, K]` and targets `[M, O]`."""
        x, y = x - self.pivot_x, y - self.pivot_y
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        if self._recent is None:
            self._recent = torch.zeros_like(self.xx, dtype=x.dtype), torch.zeros_like(self.xy, dtype=x.dtype)
        xx, xy = self._recent
        with fast_products():
            xy.addmm_(x.T, y)
            for start in range(0, x.shape[1], _BLOCK):
                end = start + _BLOCK
                xx[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        self._batches += 1
        if self._batches % _RECENT == 0:
            self._settle()

    def _settle(self) -> None:
        if self._recent is not None:
            self.xx += self._recent[0]
            self.xy += self._recent[1]
            self._recent = None

    def reduce(self) -> "Gram":
        """Add the sums of all processes, in place. Nothing can be read before."""
        self._settle()
        all_sum(self.count, self.x, self.y, self.xx, self.xy, self.yy)
        self.xx.triu_()
        self.xx += self.xx.triu(1).T
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
        mean_x, mean_y = self.x / n, self.y / n
        # From the pivot to the mean, and from there to the point.
        off_x, off_y = x - self.pivot_x.double() - mean_x, y - self.pivot_y.double() - mean_y
        xx = (self.xx / n).addr_(mean_x, mean_x, alpha=-1)
        xy = (self.xy / n).addr_(mean_x, mean_y, alpha=-1)
        if off_x.any():
            xx.addr_(off_x, off_x)
            xy.addr_(off_x, off_y)
        yy = self.yy / n - mean_y.square() + off_y.square()
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

    def outputs(self, index: torch.Tensor) -> "Moments2":
        """Return the moments of some of the targets only."""
        return Moments2(self.xx, self.xy[:, index], self.yy[index])

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error `[O]` of ``x @ weight.T`` for weight `[O, K]`."""
        return self.yy - 2 * (weight.T * self.xy).sum(0) + ((self.xx @ weight.T) * weight.T).sum(0)


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
        weight, bias: `[O, K]` and `[O]`, float64; without intercept the bias is 0.
        penalty: the one that was best on the tokens held out.
        r2_before, r2: share of the variance of the targets (64 of them at most) that the layer explained before, and
            explains now.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float
    r2_before: float
    r2: float


def solve(
    fit: Gram,
    held_out: Gram,
    weight: torch.Tensor,
    bias: torch.Tensor,
    intercept: bool = True,
    guess: float = 1e-1,
) -> Solution:
    """Return the linear layer that gives the targets best, drawn towards the layer as it is.

    Minimises the mean of ``|y - W x - b|^2`` plus ``penalty * sum_k v_k |W_k - weight_k|^2``, where v_k is the
    variance of input channel k. The penalty is the one of `PENALTIES` whose solution on ``fit`` errs least on
    ``held_out``; the solution uses both. A channel that never varies keeps its weights, and so does any direction
    the data do not have: the penalty is what decides there.

    Args:
        fit, held_out: from disjoint sets of images, with the same pivot.
        weight, bias: `[O, K]` and `[O]`, the layer before.
        intercept: False to leave the bias as it is (a layer without one has zeros).
        guess: the one of `PENALTIES` to try first; a good guess saves factorisations.
    """
    weight, bias = weight.detach().double(), bias.detach().double()
    if not held_out.count:
        held_out = fit
    outputs = torch.linspace(0, len(weight) - 1, min(len(weight), _CHOSEN_ON)).long().to(weight.device)
    centre = _centre(fit, bias, intercept)
    part, test = (gram.about(*centre).outputs(outputs) for gram in (fit, held_out))
    # Choosing needs no more than float32 for the solution; what it leaves is measured in float64.
    ridge = _Ridge(part, weight[outputs], _rounding(fit, centre[0]), torch.float32)

    def error(index: int) -> float:
        found = ridge.solve(PENALTIES[index])
        return math.inf if found is None else float(test.error(found).sum())

    penalty = PENALTIES[_lowest(error, PENALTIES.index(guess), len(PENALTIES))]
    total = fit + held_out if held_out is not fit else fit
    centre = _centre(total, bias, intercept)
    moments = total.about(*centre)
    solved = _Ridge(moments, weight, _rounding(total, centre[0])).solve(penalty)
    if solved is None:
        raise CalibrationError("least squares: the inputs' products have no factor; an image gives huge values there")
    shift = centre[1] - solved @ centre[0] if intercept else torch.zeros_like(bias)
    mean_x, mean_y = centre if intercept else total.means()
    spread = (moments if intercept else total.about(mean_x, mean_y)).outputs(outputs)
    r2_before, r2 = (
        _r2(spread, w[outputs], (mean_y - b)[outputs] - w[outputs] @ mean_x)
        for w, b in ((weight, bias), (solved, shift if intercept else bias))
    )
    return Solution(solved, shift, penalty, r2_before, r2)


def _lowest(error: Callable[[int], float], start: int, count: int) -> int:
    """Return the index with the lowest error, walking downhill from ``start``; each one tried costs a factorisation."""
    tried = {start: error(start)}
    at = start
    while True:
        for index in (at - 1, at + 1):
            if 0 <= index < count and index not in tried:
                tried[index] = error(index)
        best = min(tried, key=lambda index: tried[index])
        if best == at:
            return at
        at = best


def _centre(gram: Gram, bias: torch.Tensor, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points to measure x and y from: their means, or 0 and the bias where the bias is fixed."""
    means = gram.means()
    return means if intercept else (torch.zeros_like(means[0]), bias)


def _rounding(gram: Gram, mean: torch.Tensor) -> torch.Tensor:
    """Return the variance below which a channel with that mean `[K]` does not vary but is rounded, `[K]`."""
    return (100 * torch.finfo(gram.pivot_x.dtype).eps * mean).square()


class _Ridge:
    """One least-squares problem for any penalty, in channels scaled to variance one.

    Args:
        moments: of inputs and targets, about the same points as ``weight`` maps.
        weight: `[O, K]`, what a solution is drawn towards.
        rounding: variance `[K]` below which a channel is taken as constant.
        dtype: what the system is factorised in.
    """

    def __init__(
        self,
        moments: Moments2,
        weight: torch.Tensor,
        rounding: torch.Tensor,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        var = moments.xx.diagonal()
        # A channel that does not vary has no scale; with 0 it takes no part and keeps its weights.
        varies = (var > rounding) & (var > 1e-14 * var.max())
        self.weight = weight
        self.scale = torch.where(varies, var, 1.0).rsqrt() * varies
        self.system = (moments.xx * self.scale).mul_(self.scale[:, None]).to(dtype)
        self.missing = (moments.xy - moments.xx @ weight.T).mul_(self.scale[:, None]).to(dtype)  # [K, O]

    def solve(self, penalty: float) -> torch.Tensor | None:
        """Return the weights `[O, K]`, float64, or None if the system cannot be factorised in the dtype."""
        system = self.system.clone()
        system.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            return None
        step = torch.cholesky_solve(self.missing, factor).double()
        return self.weight + (step * self.scale[:, None]).T


def _r2(spread: Moments2, weight: torch.Tensor, offset: torch.Tensor) -> float:
    left = float((spread.error(weight) + offset.square()).sum())
    return r_squared(max(left, 0.0), float(spread.yy.sum()))  # rounding may leave less than nothing
