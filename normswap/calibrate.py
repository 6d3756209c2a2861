"""Set every BatchNorm from unlabelled images: site after site, each on what the converted model really feeds it.

A method is an `Estimator`: at one site it sees, for every token, the converted model's input x and the original
model's output y, has the original LayerNorm at hand, and then sets the BatchNorm. Two are here; a third that also
re-solves the reader's weights fits the same interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError, CalibrationError
from .graph import ModelGraph, eval_mode, find_module, operation, owner
from .lockstep import Lockstep, Observer
from .moments import JointMoments, Moments
from .norm import TokenBatchNorm
from .report import SiteFit
from .swap import batch_norms

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing; the default wherever a `Progress` is taken."""


class Estimator(ABC):
    """What one method knows about one site.

    Args:
        norm: the BatchNorm to set.
        original: the LayerNorm it stands for.
    """

    def __init__(self, norm: TokenBatchNorm, original: nn.LayerNorm) -> None:
        self.norm = norm
        self.original = original
        self.moments = JointMoments(targets=2)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens `[M, C]`: the converted model's input and what the original gives at this site."""
        self.moments.update(x, self._layer_norm(x), y)

    @abstractmethod
    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the shift `[C]`, float64, that the BatchNorm shall have in eval mode."""

    def solve(self, site: str) -> SiteFit:
        """Set the BatchNorm and say how well it fits."""
        scale, shift = self.affine()
        self.norm.set_statistics(self.moments.x.mean, self.moments.x.var)
        self.norm.set_affine(scale, shift)
        scale, shift = (v.to(scale) for v in self.norm.affine64())
        r2, r2_original = (self._r2(target, scale, shift) for target in (0, 1))
        return SiteFit(site, self.moments.x.count, r2, r2_original)

    def _r2(self, target: int, scale: torch.Tensor, shift: torch.Tensor) -> float:
        """Return the share of a target's variance that ``scale * x + shift`` explains."""
        x, y, cov = self.moments.x, self.moments.y[target], self.moments.cov[target]
        # E[(y - s x - h)^2] per channel, from the centred moments
        spread = y.var - 2 * scale * cov + scale.square() * x.var
        residual = spread + (y.mean - scale * x.mean - shift).square()
        total = y.var.sum()
        return float(1 - residual.sum() / total) if total > 0 else float(residual.sum() == 0)

    def _layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if p is None else p.detach().double() for p in (self.original.weight, self.original.bias))
        return nn.functional.layer_norm(x.double(), (x.shape[-1],), weight, bias, self.original.eps)


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


METHODS: dict[str, type[Estimator]] = {"channel": ChannelEstimator, "moments": MomentsEstimator}


class _FfnObserver(Observer):
    """Measures what passes an FFN BatchNorm, which stays the map it is."""

    def __init__(self, path: str, norm: TokenBatchNorm) -> None:
        self.path, self.norm, self.moments = path, norm, Moments()

    def __call__(self, x: torch.Tensor) -> None:
        self.moments.update(_tokens(x, self.norm))

    def solve(self) -> None:
        """Take the statistics as running mean and variance, and a weight and bias that keep the map."""
        if not self.moments.finite:
            raise CalibrationError(
                f"{self.path}: statistics are not finite; an image or a weight gives NaN or infinity there"
            )
        scale, shift = self.norm.affine64()
        self.norm.set_statistics(self.moments.mean, self.moments.var)
        self.norm.set_affine(scale, shift)


@torch.no_grad()
def calibrate(
    swapped: nn.Module,
    images: Iterable[Any],
    original: nn.Module,
    method: str = "channel",
    progress: Progress = no_progress,
) -> list[SiteFit]:
    """Set every BatchNorm of ``swapped``, in place, and return how well each reproduces its LayerNorm.

    Runs in eval mode (dropout and drop path off), needs no labels, and gives the same numbers however the images
    are batched. The activations of all images at one point of the network are held in memory.

    Args:
        swapped: from `swap_norms`; changed in place.
        images: any iterable of batches `[B, C, H, W]`, or of tuples or lists that start with one.
        original: the model it was swapped from; stays as it is.
        method: "channel" or "moments".
        progress: called with ("calibrate", sites done, sites in all).

    Raises:
        ArgumentError: unknown method, no BatchNorm to set, or no images.
        CalibrationError: statistics of a site are not finite.
    """
    if method not in METHODS:
        raise ArgumentError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    norms = batch_norms(swapped)
    sites = [path for path in norms if isinstance(find_module(original, path), nn.LayerNorm)]
    if not sites:
        raise ArgumentError(f"{type(swapped).__name__} has no BatchNorm where the original has a LayerNorm: swap first")
    observers = {path: _FfnObserver(path, norm) for path, norm in norms.items() if path not in sites}
    weight = next(original.parameters())
    batches = (batch.to(weight) for batch in rebatched(images))
    with eval_mode(original, swapped):
        first = next(batches, None)
        if first is None:
            raise ArgumentError("no images to calibrate on")
        sites = _in_order(original, first, sites)
        lockstep = Lockstep(original, swapped, sites, _chain(first, batches), dict(observers))
        fits = []
        for i, site in enumerate(sites):
            progress("calibrate", i, len(sites))
            fits.append(_calibrate_site(site, norms[site], original.get_submodule(site), method, lockstep))
        lockstep.finish()
        for observer in observers.values():
            observer.solve()
        progress("calibrate", len(sites), len(sites))
    return fits


def _calibrate_site(site: str, norm: TokenBatchNorm, layer_norm: nn.Module, method: str, lockstep: Lockstep) -> SiteFit:
    estimator = METHODS[method](norm, layer_norm)  # type: ignore[arg-type]
    for x, y in lockstep.pairs(site):
        estimator.update(_tokens(x, norm), _tokens(y, norm))
    if not estimator.moments.finite:
        raise CalibrationError(f"{site}: statistics are not finite: an image or a weight gives NaN or infinity there")
    return estimator.solve(site)


def rebatched(images: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the images `[B, C, H, W]` in batches as large as the first one, the last one smaller."""
    size, held, count = 0, [], 0
    for item in images:
        batch = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
            raise ArgumentError("images must be batches [B, C, H, W], or tuples that start with one")
        size = size or len(batch)
        held.append(batch)
        count += len(batch)
        while size and count >= size:
            joined = torch.cat(held) if len(held) > 1 else held[0]
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if count:
        yield torch.cat(held)


def _tokens(x: torch.Tensor, norm: TokenBatchNorm) -> torch.Tensor:
    return x.movedim(norm.channel_dim, -1).reshape(-1, norm.num_features)  # [..., C] -> [M, C]


def _in_order(model: nn.Module, batch: torch.Tensor, sites: list[str]) -> list[str]:
    """Return the sites in the order in which the model runs them."""
    wanted = set(sites)
    owners = (owner(node) for node in ModelGraph(model, batch[:1]).nodes if operation(node) == "layer_norm")
    return list(dict.fromkeys(path for path in owners if path in wanted))


def _chain(first: torch.Tensor, rest: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield first
    yield from rest
