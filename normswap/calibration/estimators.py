"""Set one BatchNorm from what the converted model feeds it and what the original gives there.

A method is an `Estimator`: at one site it sees, for every token, the converted model's input x and the original
model's output y, has the original LayerNorm at hand, and then sets the BatchNorm.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from ..errors import CalibrationError
from ..layers import TokenBatchNorm
from ..model_utils import widened
from ..records.report import SiteFit
from .moments import JointMoments, r_squared


class Estimator(ABC):
    """What one method knows about one site.

    To add a method: subclass this with an `affine` that returns the scale and shift a BatchNorm shall have, from
    ``self.moments`` (x is the converted model's input; y[0] is what the LayerNorm gives on it, y[1] what the original
    model has there); name it in `ESTIMATORS` below and in ``METHODS`` of `normswap.calibration.options`, from where
    command line and checks take it.

    Args:
        norm: the BatchNorm to set.
        original: the LayerNorm it stands for.
    """

    def __init__(self, norm: TokenBatchNorm, original: nn.LayerNorm) -> None:
        self.norm = norm
        self.original = original
        self.moments = JointMoments(targets=2)
        self.prefix: JointMoments | None = None

    def update(self, x: torch.Tensor, y: torch.Tensor, prefix: torch.Tensor | None = None) -> None:
        """Add tokens `[M, C]`: the converted model's input and what the original gives at this site.

        ``prefix`` `[M]` says which of them are class or register tokens, where they can be told from patches.
        """
        target = layer_norm(self.original, x)
        x = self.norm.bounded(x)
        self.moments.update(x, target, y)
        if prefix is not None:
            self.prefix = self.prefix or JointMoments()
            self.prefix.update(x[prefix], target[prefix])

    @abstractmethod
    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the shift `[C]`, float64, that the BatchNorm shall have in eval mode."""

    def solve(self, site: str) -> SiteFit:
        """Set the BatchNorm and say how well it fits."""
        self.moments.reduce()
        if not self.moments.finite:
            raise CalibrationError(
                f"{site}: statistics are not finite: an image or a weight gives NaN or infinity there"
            )
        scale, shift = self.affine()
        self.norm.set_statistics(self.moments.x.mean, self.moments.x.var)
        self.norm.set_affine(scale, shift)
        scale, shift = (v.to(scale) for v in self.norm.affine64())
        left = [squares(self.moments, target, scale, shift) for target in (0, 1)]
        r2, r2_original = (r_squared(*sums) for sums in left)
        patch, prefix = r2, None
        if self.prefix is not None:
            self.prefix.reduce()
        if self.prefix is not None and self.prefix.x.count:
            part = squares(self.prefix, 0, scale, shift, self.moments.y[0].mean)
            prefix = r_squared(*part)
            patch = r_squared(*(max(whole - of_prefix, 0.0) for whole, of_prefix in zip(left[0], part, strict=True)))
        return SiteFit(site, self.moments.x.count, r2, r2_original, patch, prefix)


def layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Return what a LayerNorm gives on tokens `[M, C]`, float32 at least."""
    x = widened(x)
    weight, bias = (None if p is None else p.detach().to(x) for p in (norm.weight, norm.bias))
    return nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, norm.eps)


def squares(
    moments: JointMoments, target: int, scale: torch.Tensor, shift: torch.Tensor, about: torch.Tensor | None = None
) -> tuple[float, float]:
    """Return sums of squares over tokens and channels: of what ``scale * x + shift`` leaves, and of the target.

    Args:
        about: `[C]`, what the target's deviations are measured from; default: its own mean. With the mean over all
            tokens the sums of prefix and patch tokens add up to those of all, and a token that is the same in every
            image, as the class token is in the first block, still has something to explain.
    """
    x, y, cov = moments.x, moments.y[target], moments.cov[target]
    # E[(y - s x - h)^2] per channel, from the centred moments
    spread = y.var - 2 * scale * cov + scale.square() * x.var
    residual = spread + (y.mean - scale * x.mean - shift).square()
    total = y.var if about is None else y.var + (y.mean - about).square()
    return float(residual.sum()) * x.count, float(total.sum()) * x.count


class MomentsEstimator(Estimator):
    """Mean and variance of the input, with LayerNorm's own weight and bias: what the literature's scripts do.

    Kept as the baseline that shows why it fails: the weight was learnt for tokens that each have variance 1.
    """

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, var = self.moments.x.mean, self.moments.x.var
        weight, bias = (None if p is None else p.detach().to(mean) for p in (self.original.weight, self.original.bias))
        scale = (var + self.norm.eps).rsqrt()
        scale = scale if weight is None else weight * scale
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias


class ChannelEstimator(Estimator):
    """Per-channel least squares: scale = cov(x, t) / var(x), shift = mean(t) - scale * mean(x).

    The target t lies halfway between two that each fail alone (examples/compare_methods.py measures the result).
    What the original model has here, y: sites before have left noise in x, and regressing on y shrinks every scale
    by it, so the signal dies out with depth. What the LayerNorm gives on x: keeps the signal, but lets the drift of
    the sites before grow, until single images blow up.
    """

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, (local, original) = self.moments.x, self.moments.y
        cov = sum(self.moments.cov) / 2
        mean = (local.mean + original.mean) / 2
        # A channel that varies by less than float32 can tell from its mean is constant: it carries no slope.
        constant = x.var.sqrt() <= torch.finfo(torch.float32).eps * x.mean.abs()
        scale = torch.where(constant, 0.0, cov / x.var)
        return scale, mean - scale * x.mean


# "reconstruct" sets the norm as "channel" does and then re-solves the layers around it.
ESTIMATORS: dict[str, type[Estimator]] = {
    "reconstruct": ChannelEstimator,
    "channel": ChannelEstimator,
    "moments": MomentsEstimator,
}
