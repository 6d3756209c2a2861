"""What `convert` and `fuse` both hold a result against, and how they describe it."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from ..evaluation.worst_images import WorstImages
from ..inputs.dataset import ImageSet
from ..model_utils import has_classes, pretrained_cfg
from ..outputs.rebuild import as_recorded
from ..planning.foldability import Verdict
from ..records.worst_images import WorstImage
from ..surgery.fold import Difference, difference, fold_norms

# A fold is proven in float64, on few images since it is a matter of arithmetic and not of content. There a right one
# differs by 1e-15 to 1e-8 of the outputs' size (docs/coverage.md), a wrong one by as much as it does in float32.
EXACT, _PROVEN_ON = 1e-6, 8
# In the model's own dtype the difference is rounding and nothing else, so its bound is relative to what is rounded: the
# root mean square of the outputs, which no single image decides. Float32 rounds to 6e-8; a dozen blocks with weights of
# order one make 1e-5 of it. From 1e-3 on the conversion amplifies rounding ten thousand times: right, but worth a word.
ROUNDING = 1e-3
# An answer may flip where two logits tie, and one in a thousand images may be such a tie.
SAME_ANSWERS = 99.9
# Images of a set that are held to check the fold on, enough to tell one tie from more; accuracy is measured on all.
FOLD_IMAGES = 1024


def pictured(worst: WorstImages, images: Iterable[Any], model: nn.Module) -> tuple[list[WorstImage], list[str]]:
    """Return the images that changed most and their thumbnails, named as the set they came from names them."""
    seen = images if isinstance(images, ImageSet) else None
    config = pretrained_cfg(model)
    names = class_names(config, seen)
    if len(names) != getattr(as_recorded(model), "num_classes", len(names)):  # those of the head that was there before
        names = seen.classes if seen else []
    found = worst.found(names, seen.filename if seen else None)
    normalised = (seen.mean, seen.std) if seen else (config.get("mean") or (0.0,), config.get("std") or (1.0,))
    return found, worst.thumbnails(*normalised)


def class_names(config: dict[str, Any], images: ImageSet | None) -> list[str]:
    """Return the names of the classes: those in timm's config, else those of the folders; empty if there are none."""
    names, told = config.get("label_names"), config.get("label_descriptions")
    if not isinstance(names, list | tuple):
        return images.classes if images else []
    return [str(told.get(name, name)) if isinstance(told, dict) else str(name) for name in names]


@dataclass(frozen=True)
class FoldCheck:
    """What is known about a fold.

    Attributes:
        found: fused against unfused, in the model's own dtype.
        exact: largest difference of an output in float64, relative to the size of the outputs, on a few images; None
            where the model does not run in float64.
        dtype: of the model.
        classes: whether its outputs are logits.
    """

    found: Difference
    exact: float | None
    dtype: torch.dtype
    classes: bool

    @classmethod
    def of(
        cls,
        unfused: nn.Module,
        fused: nn.Module,
        batches: Sequence[torch.Tensor],
        verdicts: Mapping[str, Verdict],
    ) -> Self:
        """Compare a model before and after the fold.

        Args:
            unfused, fused: in eval mode.
            batches: images `[B, C, H, W]`.
            verdicts: by which it was folded, from `judge_fold`.
        """
        dtype = next(unfused.parameters()).dtype
        found = difference(unfused, fused, batches)
        return cls(found, _in_float64(unfused, batches[0][:_PROVEN_ON], verdicts), dtype, has_classes(unfused))

    @property
    def agreement(self) -> float | None:
        """Percent of images with the same answer; None for headless models."""
        return self.found.agreement if self.classes else None

    @property
    def record(self) -> dict[str, Any]:
        """The fields of a `ConversionReport` about the fold."""
        return {
            "fold_max_abs_err": self.found.largest,
            "fold_max_rel_err": self.found.relative,
            "fold_float64_err": self.exact,
            "fold_agreement": self.agreement,
            "fold_warning": self.warning,
        }

    @property
    def _rounded_little(self) -> bool:
        same = self.agreement is None or self.agreement >= SAME_ANSWERS
        return self.found.relative <= ROUNDING and same

    def problem(self, atol: float | None) -> str | None:
        """Say why the fused model must not be used; None where nothing is wrong with it.

        Args:
            atol: largest difference of an output that the caller accepts; None for what rounding explains.
        """
        if self.exact is not None and not self.exact <= EXACT:
            return f"{self._apart}{self._reason}"
        if atol is not None:
            above = not self.found.largest <= atol
            return f"{self._apart}, more than `atol` {atol:g}{self._reason}" if above else None
        if not math.isfinite(self.found.relative):
            return f"fused or unfused gives outputs that are not finite{self._reason}"
        return f"{self._apart}{self._reason}" if self.exact is None and not self._rounded_little else None

    @property
    def warning(self) -> str | None:
        """Say that rounding moved the outputs by more than it usually does; None where it did not."""
        if self._rounded_little or self.problem(None) is not None:
            return None
        same = "" if self.agreement is None else f", the same top-1 on {self.agreement:.2f} % of images"
        return f"{self._apart} ({100 * self.found.relative:.2g} % of their size{same}){self._reason}"

    @property
    def _apart(self) -> str:
        return f"fused and unfused differ by {self.found.largest:.3g} in {'a logit' if self.classes else 'an output'}"

    @property
    def _reason(self) -> str:
        """Whether the fold or the model's own conditioning is at fault."""
        if self.exact is None:
            return " (the model does not run in float64, so the fold cannot be told from rounding)"
        if not self.exact <= EXACT:
            return f" (in float64 by {self.exact:.3g} of their size, so the fold is wrong)"
        text = f"; in float64 by {self.exact:.1g} of their size, so the fold is right"
        if self._rounded_little:
            return f"{text} and this is rounding"
        if self.dtype in (torch.float16, torch.bfloat16):
            return f"{text} but {str(self.dtype).removeprefix('torch.')} is coarse: convert model.float()"
        return f"{text} but this conversion amplifies rounding errors"


def _in_float64(unfused: nn.Module, images: torch.Tensor, verdicts: Mapping[str, Verdict]) -> float | None:
    """Fold a copy in float64 and return the largest difference relative to the outputs; None if it does not run."""
    try:
        double = copy.deepcopy(unfused).double()
        return difference(double, fold_norms(double, verdicts=verdicts), [images.double()]).relative
    except (RuntimeError, TypeError, NotImplementedError):  # tensors of its own that stay float32; a device without
        return None
