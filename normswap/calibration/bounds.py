"""Bound what arrives at a norm to the range that each channel has on the calibration images.

LayerNorm gives every token one size, whatever the image. A BatchNorm passes on whatever comes, and so does everything
behind it, so on an image unlike the calibration images sizes multiply from block to block. A range per channel stops
that and costs little on images like them. It lies between quantiles, as the range of a quantised activation does
(Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..distributed import all_rows
from ..layers import TokenBatchNorm
from ..model_utils import widened
from .estimators import layer_norm, squares
from .lockstep import Lockstep, Stop
from .moments import CACHED_ROWS, JointMoments
from .options import AUTO, BOUNDS
from .reconstruction import ROWS_KEPT, drawn, held_out, prefix_rows
from .solvable_layers import Writer

# Share of the values within the range, from tightest to widest; half of what is outside lies on either side.
SHARES = {"tight": 0.99, "wide": 0.9995}
NONE = BOUNDS[0]
# A range is taken if, on images held out, it adds at most this share to the squared error of the norm.
TOLERATED = 0.05

# Tokens at one place in an image are a kind of their own if so many times more of their values lie outside the range.
OWN_KIND = 5

Range = tuple[torch.Tensor, torch.Tensor]


class Bounds:
    """Sets the bound of one norm after the other, from what the converted model feeds it.

    Args:
        lockstep: both models.
        original: the model with LayerNorm.
        norms: every BatchNorm of the converted model, by path.
        bound: one of `BOUNDS`, or "auto".
    """

    def __init__(self, lockstep: Lockstep, original: nn.Module, norms: dict[str, TokenBatchNorm], bound: str) -> None:
        self.lockstep, self.original, self.norms, self.bound = lockstep, original, norms, bound
        for norm in norms.values():  # of a calibration before
            norm.lower = norm.upper = None
        self.prefix_tokens = int(getattr(original, "num_prefix_tokens", 0) or 0)

    def set(self, path: str, writer: Writer | None = None) -> str:
        """Bound what arrives at a norm, or not, and return the name of its bound.

        Args:
            path: of the norm; everything in front of it is set.
            writer: the layer whose output goes through the norm on its way to the residual stream, if there is one.
        """
        if self.bound == NONE:
            return NONE
        norm, site = self.norms[path], Stop(path)
        rows = _Rows(norm)
        for batch in self.lockstep.visit(converted=writer.stop if writer else site):
            source = batch.converted.steps[batch.converted.at(site)].reads[0]
            x = batch.peek(batch.converted.place(source)) if writer else batch.values[source]
            rows.add(batch.number, x, prefix_rows(x, norm, self.prefix_tokens), self.lockstep.count)
        name = self.bound
        if name == AUTO:
            name = rows.choice(self.original.get_submodule(path))  # type: ignore[arg-type]
        if name != NONE:
            norm.set_bound(*rows.ranges()[name])
        return name


class _Rows:
    """Tokens `[M, C]` that arrive at a norm, and where each stands in its image: fitted to and held out apart.

    Args:
        norm: the BatchNorm.
    """

    def __init__(self, norm: TokenBatchNorm) -> None:
        self.norm = norm
        nothing = norm.running_mean.new_zeros(0, norm.num_features), norm.running_mean.new_zeros(0, dtype=torch.long)
        self.parts: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {False: [nothing], True: [nothing]}

    def add(self, number: int, x: torch.Tensor, prefix: torch.Tensor, batches: int) -> None:
        """Add those of one batch, a part of them if there are plenty; prefix tokens `[M]` have a share of their own."""
        tokens = self.norm.tokens(x)
        count = x.shape[1] if x.ndim == 3 and self.norm.channel_dim in (-1, 2) else 1
        places = torch.arange(len(tokens), device=x.device) % count
        for kind in (prefix, ~prefix):
            if kind.any():
                rows = drawn(number, ROWS_KEPT, batches, tokens[kind], places[kind])
                self.parts[held_out(number)].append((rows[0], rows[1]))

    def ranges(self, *held: bool) -> dict[str, Range]:
        """Return the range of each bound; of all tokens, or those of images that are or are not ``held`` out."""
        parts = [part for key in held or (False, True) for part in self.parts[key]]
        return channel_ranges(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def choice(self, norm: nn.LayerNorm) -> str:
        """Return the bound to take, from the ranges of images fitted to and the error on those held out."""
        candidates: dict[str, Range | None] = {**self.ranges(False), NONE: None}
        return chosen({name: self._error(norm, found) for name, found in candidates.items()})

    def _error(self, norm: nn.LayerNorm, bound: Range | None) -> float:
        """Return the squared error on images held out of what is fitted, within a bound, to a LayerNorm's output."""
        sums = []
        for held in (False, True):
            moments = JointMoments()
            for part in torch.cat([tokens for tokens, _ in self.parts[held]]).split(CACHED_ROWS):
                moments.update(part if bound is None else part.clamp(*bound), layer_norm(norm, part))
            moments.reduce()
            sums.append(moments)
        fit, tested = sums
        scale = torch.where(fit.x.var > 0, fit.cov[0] / fit.x.var, 0.0)
        return squares(tested, 0, scale, fit.y[0].mean - scale * fit.x.mean)[0]


def channel_ranges(tokens: torch.Tensor, places: torch.Tensor) -> dict[str, Range]:
    """Return lower and upper end `[C]` of each channel, by the name of the bound, from tightest to widest.

    Class and register tokens are few, and differ from patches by far. So tokens at a place whose values lie outside the
    range of all much more often than others have quantiles of their own, and the wider range counts.

    Args:
        tokens: `[M, C]` of this process.
        places: `[M]`, where in its image each of them stands.

    >>> values = torch.linspace(-1, 1, 2001)[:, None]
    >>> [round(float(end), 3) for end in channel_ranges(values, torch.zeros(2001, dtype=torch.long))["tight"]]
    [-0.99, 0.99]
    """
    tokens, places = all_rows(tokens), all_rows(places[:, None])[:, 0]
    found = _quantiles(tokens)
    lower, upper = found["tight"]
    outside = ((tokens < lower) | (tokens > upper)).double().mean(1)
    counts = torch.bincount(places).clamp(min=1)
    often = torch.zeros_like(counts, dtype=torch.float64).index_add_(0, places, outside) / counts
    for place in (often > OWN_KIND * (1 - SHARES["tight"])).nonzero()[:, 0]:
        for name, (low, high) in _quantiles(tokens[places == place]).items():
            found[name] = torch.minimum(found[name][0], low), torch.maximum(found[name][1], high)
    return found


def _quantiles(tokens: torch.Tensor) -> dict[str, Range]:
    """Return the range `[C]` of each bound; torch's own quantile sorts, and refuses so many values."""
    values = widened(tokens).T.contiguous()  # [M, C] -> [C, M]
    last = values.shape[1] - 1
    tails = {name: (1 - share) / 2 * last for name, share in SHARES.items()}
    ends = {name: (tail, last - tail) for name, tail in tails.items()}
    needed = {min(int(at) + step, last) for pair in ends.values() for at in pair for step in (0, 1)}
    if values.device.type == "cpu":  # in their places are the needed ones only, which takes a fraction of a sort
        values = torch.from_numpy(np.partition(values.numpy(), sorted(needed), axis=1))
    else:
        values = values.sort(1).values

    def at(place: float) -> torch.Tensor:
        below = int(place)
        return torch.lerp(values[:, below], values[:, min(below + 1, last)], place - below).to(tokens.dtype)

    return {name: (at(low), at(high)) for name, (low, high) in ends.items()}


def chosen(errors: Mapping[str, float]) -> str:
    """Return the first bound whose error is hardly above that without a bound.

    Args:
        errors: squared errors on images held out, from tightest to widest, "none" last.

    >>> chosen({"tight": 1.2, "wide": 1.001, "none": 1.0})
    'wide'
    """
    if not errors[NONE] > 0:  # nothing was held out
        return NONE
    limit = (1 + TOLERATED) * errors[NONE]
    return next((name for name, error in errors.items() if error <= limit), NONE)
