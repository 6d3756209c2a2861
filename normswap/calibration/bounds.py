"""Bound what arrives at a norm to the range that each channel has on the calibration images.

LayerNorm gives every token one size, whatever the image. A BatchNorm passes on whatever comes, and so does everything
behind it, so on an image unlike the calibration images sizes multiply from block to block. A range per channel stops
that and costs little on images like them. It lies between quantiles, as the range of a quantised activation does
(Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..distributed import all_rows
from ..layers import TokenBatchNorm
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
        rows = _Rows()
        for batch in self.lockstep.visit(converted=writer.stop if writer else site):
            source = batch.converted.steps[batch.converted.at(site)].reads[0]
            x = batch.peek(batch.converted.place(source)) if writer else batch.values[source]
            tokens, prefix = norm.tokens(x), prefix_rows(x, norm, self.prefix_tokens)
            (patches,) = drawn(batch.number, ROWS_KEPT, self.lockstep.count, tokens[~prefix])
            rows.add(held_out(batch.number), patches, tokens[prefix])
        ranges = rows.ranges()
        name = self.bound
        if name == AUTO:
            norm_before: Any = self.original.get_submodule(path)
            errors = {name: rows.error(norm_before, found) for name, found in {**ranges, NONE: None}.items()}
            name = chosen(errors)
        if name != NONE:
            norm.set_bound(*ranges[name])
        return name


class _Rows:
    """Tokens `[M, C]` that arrive at a norm: of images fitted to and held out, patches and prefix tokens apart."""

    def __init__(self) -> None:
        self.parts: dict[tuple[bool, bool], list[torch.Tensor]] = {}

    def add(self, held: bool, patches: torch.Tensor, prefix: torch.Tensor) -> None:
        """Add those of one batch."""
        for kind, rows in ((False, patches), (True, prefix)):
            for both in (True, False):  # so that no kind is missing
                self.parts.setdefault((both, kind), [rows[:0]])
            self.parts[held, kind].append(rows)

    def ranges(self) -> dict[str, Range]:
        """Return the range of each bound."""
        kinds = [torch.cat(self.parts[False, kind] + self.parts[True, kind]) for kind in (False, True)]
        return channel_ranges(*kinds)

    def error(self, norm: nn.LayerNorm, bound: Range | None) -> float:
        """Return the squared error on images held out of what is fitted, within a bound, to a LayerNorm's output."""
        sums = []
        for held in (False, True):
            moments = JointMoments()
            for part in torch.cat(self.parts[held, False] + self.parts[held, True]).split(CACHED_ROWS):
                moments.update(part if bound is None else part.clamp(*bound), layer_norm(norm, part))
            moments.reduce()
            sums.append(moments)
        fit, tested = sums
        scale = torch.where(fit.x.var > 0, fit.cov[0] / fit.x.var, 0.0)
        return squares(tested, 0, scale, fit.y[0].mean - scale * fit.x.mean)[0]


def channel_ranges(patches: torch.Tensor, prefix: torch.Tensor) -> dict[str, Range]:
    """Return lower and upper end `[C]` of each channel, by the name of the bound, from tightest to widest.

    Class and register tokens are few, and differ from patches by far: each kind has its own quantiles, and the wider
    range counts.

    Args:
        patches, prefix: tokens `[M, C]` of this process, of each kind; one of them may be none.

    >>> ranges = channel_ranges(torch.linspace(-1, 1, 2001)[:, None], torch.zeros(0, 1))
    >>> [round(float(end), 3) for end in ranges["tight"]]
    [-0.99, 0.99]
    """
    kinds = [rows for rows in map(all_rows, (patches, prefix)) if len(rows)]
    ordered = [rows.T.contiguous().sort(1).values for rows in kinds]  # [M, C] -> [C, M]
    found = {}
    for name, share in SHARES.items():
        tail = (1 - share) / 2
        lower = torch.stack([_quantile(values, tail) for values in ordered]).amin(0)
        found[name] = lower, torch.stack([_quantile(values, 1 - tail) for values in ordered]).amax(0)
    return found


def _quantile(ordered: torch.Tensor, share: float) -> torch.Tensor:
    """Return a quantile `[C]` of sorted values `[C, M]`; torch's own function refuses so many."""
    at = share * (ordered.shape[1] - 1)
    below = int(at)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], at - below)


def chosen(errors: Mapping[str, float]) -> str:
    """Return the first bound whose error is hardly above that without a bound.

    Args:
        errors: squared errors on images held out, from tightest to widest, "none" last.

    >>> chosen({"tight": 1.2, "wide": 1.001, "none": 1.0})
    'wide'
    """
    limit = (1 + TOLERATED) * errors[NONE]
    return next((name for name, error in errors.items() if error <= limit), NONE)
